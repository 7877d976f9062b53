"""The tables of `kernels/tuned` as the benches that find configurations print and write them."""

import torch

from kernels.tuning import SHIPPED, Entries, card_name, file_name, format_table, shipped_file, write_table


def publish(entries: Entries, is_written: bool) -> None:
    """Print configurations as a table of this card.

    is_written: also put them into the table shipped for the card, which a card without one gets.
    """
    card = card_name(torch.device("cuda", torch.cuda.current_device()))
    print(f"\n{format_table([card], entries)}")
    if is_written:
        path = shipped_file(card) or SHIPPED / f"{file_name(card)}.json"
        write_table(path, [card], entries)
        print(f"written to {path}")
