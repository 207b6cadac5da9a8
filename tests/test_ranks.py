"""support/ranks.py: what ranks tell each other, how they agree and end, sums in a fixed order.

Whole runs on several ranks: test_distributed.py. Restarts, agents and hosts: test_cluster.py.
"""

import json
import os
import re
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tools import torchrun

from support import ranks
from support.ranks import GradientTree, Ranks, check_tree, checksum
from support.script import UserError

# ------------------------------------------------------------------------ what they tell each other

TWO_RANKS = """
import json, sys, torch
from support import runtime, script

def fail():
    raise ValueError("a fault of it")

def outcome(work, *args):
    try:
        return work(*args)
    except (ValueError, script.UserError) as error:
        return f"{type(error).__name__}: {error}"

def main():
    rt = runtime.start("cpu", "float32")
    sent = torch.full((2,), 5.0 + rt.rank)
    rt.send_from_main([sent])
    equal, other = torch.ones(3), torch.ones(3) + rt.rank
    answers = {
        "rank": rt.rank,
        "world_size": rt.world_size,
        "sum": rt.sum(torch.tensor([1.0, 10.0]) * (rt.rank + 1)).tolist(),
        "largest": rt.max_over_ranks(rt.rank + 3),
        "gathered": rt.gather(rt.rank),
        "sent": sent.tolist(),
        "on main": rt.on_main(lambda a, b: [rt.rank, a, b], "a", rt.rank),
        "failed on main": outcome(rt.on_main, fail),
        "on all": rt.on_all(lambda a: [rt.rank, a], "a"),
        "failed on 1": outcome(rt.on_all, lambda: rt.rank and fail()),
        "same": rt.same_on_all({"--seed": 1}, "the same flags"),
        "not the same": outcome(rt.same_on_all, {"a": 1, "--seed": rt.rank}, "the same flags"),
        "equal": rt.check_equal([equal], "step 4: weights"),
        "not equal": outcome(rt.check_equal, [equal, other], "step 4: weights"),
    }
    rt.say("said by rank", str(rt.rank))
    open(f"{sys.argv[1]}/{rt.rank}.json", "w").write(json.dumps(answers))

script.run_script(main)
"""


def test_two_ranks_share_values_and_failures(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    done = torchrun(2, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "said by rank\n0\n"  # rank 1 is silent
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for rank, answers in enumerate((zero, one)):
        assert answers["rank"] == rank
        assert answers["world_size"] == 2
        assert answers["sum"] == [3.0, 30.0]
        assert answers["largest"] == 4
        assert answers["gathered"] == [0, 1]
        assert answers["sent"] == [5.0, 5.0]
        assert answers["on main"] == [0, "a", 0]
        assert answers["on all"] == [rank, "a"]
        assert answers["same"] is None and answers["equal"] is None
    # Whoever has failed has the error.
    assert zero["failed on main"] == one["failed on 1"] == "ValueError: a fault of it"
    assert "the flags or the data of rank 1 differ from rank 0's: --seed;" in zero["not the same"]
    assert zero["not equal"].startswith("UserError: step 4: weights of rank 1 are not those of")
    ends = "UserError: rank 1 ends, since rank 0 has failed: "
    assert one["failed on main"] == f"{ends}ValueError: a fault of it"
    assert one["not the same"] == zero["not the same"].replace("UserError: ", ends)
    assert one["not equal"] == zero["not equal"].replace("UserError: ", ends)
    assert zero["failed on 1"] == (
        "UserError: rank 0 ends, since rank 1 has failed: ValueError: a fault of it"
    )


def test_a_process_alone_needs_no_process_group():
    alone = Ranks()
    assert alone.is_main
    assert alone.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert alone.max_over_ranks(3) == 3
    assert alone.broadcast("x") == "x"
    assert alone.on_main(max, 1, 2) == alone.on_all(max, 1, 2) == 2
    with pytest.raises(ZeroDivisionError):
        alone.on_main(lambda: 1 // 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("place", [0, 3, 2**20])
def test_a_single_flipped_bit_changes_the_checksum(place):
    """In each of its 32 bits, in a tensor that is summed in pieces."""
    tensor = torch.randn(2**20 + 1)
    before = checksum([torch.ones(3), tensor])
    bits = tensor.view(torch.int32)
    for bit in range(32):
        mask = torch.tensor(2**bit).to(torch.int32)
        bits[place] ^= mask
        assert checksum([torch.ones(3), tensor]) != before
        bits[place] ^= mask
    assert checksum([torch.ones(3), tensor]) == before


# --------------------------------------------------------------------------- sums in a fixed order


def micro_batches(count: int) -> list[list[torch.Tensor]]:
    """A loss and two gradients each, of very different sizes, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        size = 10.0 ** torch.randint(-3, 4, (1,), generator=generator)
        batches.append([size * torch.randn(100, generator=generator) for _ in range(3)])
    return batches


def tree_of(batches: list[list[torch.Tensor]], place: Ranks) -> GradientTree:
    """One rank's tree, with its micro-batches taken."""
    tree = GradientTree([torch.nn.Parameter(torch.zeros(100)) for _ in range(2)], place)
    for loss, *gradients in batches:
        for p, gradient in zip(tree.parameters, gradients, strict=True):
            p.grad = gradient
        tree.take(loss)
    return tree


def sums_on(world_size: int, batches: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """What rank 0 gets: the ranks run one after the other, and a stand-in gathers their sums."""
    count = len(batches) // world_size
    parts = [batches[rank * count : (rank + 1) * count] for rank in range(world_size)]
    alone = []
    for part in parts:
        tree = tree_of(part, Ranks())
        loss = tree.finish()
        alone.append([loss, *(p.grad for p in tree.parameters)])
    gathered = iter(zip(*alone, strict=True))

    def all_gather(places, tensor):
        sums = next(gathered)
        assert torch.equal(tensor, sums[0])
        for place, value in zip(places, sums, strict=True):
            place.copy_(value)

    tree = tree_of(parts[0], Ranks(0, world_size))
    with mock.patch.object(ranks.dist, "all_gather", all_gather):
        loss = tree.finish()
    return [loss, *(p.grad for p in tree.parameters)]


def test_one_rank_adds_pairs_then_pairs_of_pairs():
    a, b, c, d = micro_batches(4)
    for i, found in enumerate(sums_on(1, [a, b, c, d])):
        assert torch.equal(found, (a[i] + b[i]) + (c[i] + d[i]))


@pytest.mark.parametrize("world_size", [2, 4, 8, 16])
def test_any_number_of_ranks_gives_the_same_bits(world_size):
    batches = micro_batches(16)
    for expected, found in zip(sums_on(1, batches), sums_on(world_size, batches), strict=True):
        assert torch.equal(expected, found)


def test_the_order_of_adding_shows_in_these_tensors():
    """Otherwise the test above would pass for any order."""
    batches = micro_batches(16)
    one_by_one = torch.zeros(100)
    for tensors in batches:
        one_by_one = one_by_one + tensors[0]
    assert not torch.equal(one_by_one, sums_on(1, batches)[0])


@pytest.mark.parametrize(
    "numbers, found", [((8, 3), "3 ranks"), ((6, 2), "6 micro-batches"), ((0, 6), "6 ranks")]
)
def test_numbers_that_make_no_whole_tree_are_refused(numbers, found):
    with pytest.raises(UserError, match=found):
        check_tree(*numbers)


def test_powers_of_two_make_a_whole_tree():
    for micro_batches_of_a_rank, world_size in ((1, 1), (1, 8), (16, 1), (4, 4)):
        check_tree(micro_batches_of_a_rank, world_size)


# ------------------------------------------------------------------------------- place and meeting


def set_place(monkeypatch, environment: dict[str, str]) -> None:
    for name in list(os.environ):
        if re.match("(LOCAL_)?RANK|WORLD_SIZE|MASTER_|SLURM_|OMPI_|PMI_|TORCHELASTIC_", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, (0, 1)),
        ({"WORLD_SIZE": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2", "RANK": "1", "SLURM_STEP_NUM_TASKS": "2"}, (1, 2)),  # torchrun's
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (0, 1)),  # runs of their own
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1)),  # a batch script, without srun
    ],
    ids=str,
)
def test_a_place_among_the_ranks(monkeypatch, environment, place):
    set_place(monkeypatch, environment)
    assert ranks.place() == place


@pytest.mark.parametrize(
    "nodes, first", [("n1", "n1"), ("gpu[07-09,12],cpu1", "gpu07"), ("a,b[1-2]", "a")]
)
def test_a_task_of_srun_is_a_rank(monkeypatch, nodes, first):
    task = {"PROCID": "5", "STEP_NUM_TASKS": "8", "LOCALID": "1", "JOB_ID": "30007"}
    task["STEP_NODELIST"] = nodes
    set_place(monkeypatch, {f"SLURM_{name}": value for name, value in task.items()})
    with mock.patch.dict(os.environ):
        assert ranks.place() == (5, 8)
        assert ranks.address_of_store() == (first, 15007)
        assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "1"}, "RANK is '1', and WORLD_SIZE is '1'"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK is '0', and WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1", "RANK": "0"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2', and WORLD_SIZE is '2'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
        ({"PMI_RANK": "0", "PMI_SIZE": "3"}, "mpiexec has started 3 processes"),
    ],
    ids=str,
)
def test_a_wrong_place_among_the_ranks_is_refused(monkeypatch, environment, message):
    set_place(monkeypatch, environment)
    with pytest.raises(UserError, match=message):
        ranks.place()


@pytest.mark.parametrize("host, port", [("", "29500"), ("node0", ""), ("node0", "70000")])
def test_a_wrong_address_of_the_store_is_refused(monkeypatch, host, port):
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
    set_place(monkeypatch, place)
    with pytest.raises(UserError, match="WORLD_SIZE is 2, MASTER_ADDR is .* MASTER_PORT"):
        ranks.address_of_store()


@pytest.mark.parametrize(
    "restarts, out, resume, is_refused",
    [("3", "", True, True), ("3", "run", False, True), ("3", "run", True, False)]
    + [("0", "", False, False), (None, "", False, False)],
)
def test_a_job_that_may_restart_names_its_run(monkeypatch, restarts, out, resume, is_refused):
    set_place(monkeypatch, {"TORCHELASTIC_MAX_RESTARTS": restarts} if restarts else {})
    if is_refused:
        with pytest.raises(UserError, match="--max-restarts 3 without --out and --resume"):
            ranks.require_named_run(out, resume)
    else:
        ranks.require_named_run(out, resume)


def test_ranks_agree_on_a_name_whatever_earlier_attempts_have_left():
    """The store holds the calls and answers of three attempts, in two of which a rank was lost."""
    store = dist.HashStore()
    names = []
    for lost in (None, 1, None):
        answers = [""] * 3

        def meet(rank: int, answers: list[str] = answers) -> None:
            answers[rank] = ranks.agree_on_name(store, rank, 3)

        if lost is not None:  # its rank 2 called, and rank 0 never heard of rank 1
            store.set("call/2", "a token of a process that died")
            continue
        threads = [threading.Thread(target=meet, args=[rank]) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers[0] and set(answers) == {answers[0]}
        names.append(answers[0])
    assert len(set(names)) == 2  # no attempt has the name of another one


def test_a_rank_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(ranks, "MEETING_SECONDS", 0.1)
    with pytest.raises(UserError, match="rank 0 waited 0.1 s for rank 1, 2 of 3"):
        ranks.agree_on_name(dist.HashStore(), 0, 3)


def test_who_does_not_find_rank_0_says_why(monkeypatch):
    monkeypatch.setattr(ranks, "MEETING_SECONDS", 0)
    for host in ("127.0.0.1", "no.such.host.invalid"):
        with pytest.raises(UserError, match=rf"rank 1 on \S+ waited .* at {host}:1 \(\w"):
            ranks.wait_for_store(host, 1, 1)
