"""The facade: three engines behind one type, and nobody knows which."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import Engine, Health
from engine.errors import EngineStopped
from engine.local import LocalEngine
from engine.new_engine import new_engine
from engine.replicas.replica_set import ReplicaSet
from engine.replicas.stats import combined, combined_health
from tests.fake_engine import FakeEngine, fake_stats

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("one", [LocalEngine, ReplicaSet, FakeEngine])
def test_every_engine_implements_the_facade_and_inherits_from_no_other(one: type[Engine]) -> None:
    assert one.__bases__ == (Engine,)
    assert not one.__abstractmethods__


def test_the_facade_has_no_state() -> None:
    assert "__init__" not in vars(Engine)
    assert not Engine.__annotations__


def test_an_engine_that_lacks_a_method_cannot_be_made() -> None:
    class Half(FakeEngine):
        submit = Engine.submit

    with pytest.raises(TypeError, match="submit"):
        Half()


def test_the_number_of_replicas_decides_which_engine_serves() -> None:
    assert isinstance(new_engine(EngineConfig()), LocalEngine)
    assert isinstance(new_engine(EngineConfig(dp_size=2)), ReplicaSet)


@pytest.mark.parametrize("dp_size", [1, 2])
async def test_before_its_start_an_engine_says_that_it_is_starting_and_can_be_stopped(dp_size: int) -> None:
    engine = new_engine(EngineConfig(dp_size=dp_size))
    assert engine.health() == Health("starting")
    assert engine.progress() is None
    with pytest.raises(EngineStopped, match="the engine is starting"):
        _ = engine.context_length
    await engine.stop()


def test_the_facade_can_be_imported_without_torch() -> None:
    code = "import sys, engine.engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_statistics_of_replicas_add_up_but_for_ages_and_ratios() -> None:
    one, other = fake_stats(), fake_stats()
    one.loop.last_step_at, other.loop.last_step_at = 5.0, 7.0
    total = combined([one, other])
    assert total.num_requests == 6
    assert total.scheduler.num_held_tokens == 500
    assert total.scheduler.new_token_ratio == 0.7
    assert total.loop.last_step_at == 7.0


def test_one_replica_in_trouble_is_trouble_for_all() -> None:
    health = combined_health([Health("ok", 1.0, 0.5, 2, 3), Health("stuck", 40.0, 0.0, 1, 0)])
    assert health == Health("stuck", 40.0, 0.5, 3, 3)
