"""Describe how the byte-level tokenizers of GGUF files cut text into words before they merge. Data.

A file names its way (`tokenizer.ggml.pre`); the patterns are those of the models' own tokenizer.json.
"""

from dataclasses import dataclass

from engine.text.rank_file import KIMI, LLAMA_3, QWEN_2


@dataclass(frozen=True)
class Words:
    """Describe how a byte-level tokenizer cuts text into the pieces that it merges within."""

    patterns: tuple[str, ...] = ()  # each cuts what those before it left; what lies between matches is a piece, too
    is_gpt2: bool = False  # GPT-2's pattern follows these
    of_bytes: tuple[str, ...] = ()  # cut what is left when bytes have become letters
    has_whole_words: bool = False  # a piece that is in the vocabulary is a token, even if merges cannot reach it
    is_composed: bool = False  # text is normalized to NFC first
    adds_bos: bool = False  # unless the file says otherwise


ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_3_5 = QWEN_2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# Words of letters with a change from upper to lower case once; `{}` is what follows them.
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
TEKKEN = CASED % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
GPT_4O = CASED % (f"{ENDINGS}?", f"{ENDINGS}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
YOUTU = CASED % (f"{ENDINGS}?", f"{ENDINGS}?") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + SPACES
ASIAN = r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SEED = rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{SPACES}"
EXAONE_MOE = (
    rf"{ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
JAIS_2 = LLAMA_3.removesuffix(r"|\s+(?!\S)|\s+") + "".join(
    rf"|\s{{{length}}}(?!\S)" for length in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
) + r"|\s{1}"  # fmt: skip
CJK = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
# DeepSeek's own file lists the letters that have a case one by one.
DEEPSEEK_LLM = (r"[\r\n]", r"\s?[\p{Lu}\p{Ll}\p{Lt}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", CJK, r"\p{N}")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")
DEEPSEEK_3_REST = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*{SPACES}"
)
DEEPSEEK_3 = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_3_REST)
AFMOE = (
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
    DEEPSEEK_3_REST,
)
THREES = r"\d{1,3}(?=(?:\d{3})*\b)"  # digits of a number in threes, from its end
NO_PUNCTUATION = " ?[^(\\s|.,!?…。，、।۔،)]+"

GPT_2 = Words(is_gpt2=True)
DIGITS = Words((r"\p{N}",), is_gpt2=True)
# tokenizer.ggml.pre -> the way of cutting
WORDS = {
    **dict.fromkeys(
        (
            "default", "gpt-2", "mpt", "olmo", "jais", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion",
            "granite-docling",
        ),
        GPT_2,
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        Words((LLAMA_3,), has_whole_words=True, adds_bos=True),
    ),
    **dict.fromkeys(("smaug-bpe", "dbrx", "chatglm-bpe"), Words((LLAMA_3,))),
    **dict.fromkeys(("glm4", "glm5"), Words((LLAMA_3,), has_whole_words=True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo"), Words((QWEN_2,), is_composed=True)),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"), Words((QWEN_2,))),
    "qwen35": Words((QWEN_3_5,)),
    "tekken": Words((TEKKEN,), has_whole_words=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), Words((GPT_4O,))),
    "kimi-k2": Words((KIMI,)),
    **dict.fromkeys(("tiny_aya", "cohere2moe"), Words((THREES, GPT_4O))),
    "youtu": Words((ASIAN, YOUTU), has_whole_words=True),
    "deepseek-llm": Words(DEEPSEEK_LLM),
    "deepseek-coder": Words(DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), Words(DEEPSEEK_3)),
    "afmoe": Words(AFMOE),
    "falcon": Words((r"[\p{P}$+<=>^`|~]+",), is_gpt2=True, of_bytes=(r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), Words((NO_PUNCTUATION,))),
    "viking": Words((NO_PUNCTUATION, r"\p{N}")),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Words((BAILING,))),
    "seed-coder": Words((SEED,)),
    "exaone-moe": Words((EXAONE_MOE,)),
    "jais-2": Words((JAIS_2,)),
    "minicpm5": Words((r"\p{N}{1,3}", LLAMA_3.replace("{1,3}", "+")), has_whole_words=True),
    "laguna": Words((r"[^\n]+|[\n]+", QWEN_2)),
}  # fmt: skip
