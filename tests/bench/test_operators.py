"""The benchmark of attention over a long history: what is wrong or fails has no speed."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from decmem.bench import operator_ways, operators
from decmem.bench.operator_problem import dense_problem, fused, judged, sparse_problem, written_out
from decmem.bench.operator_shapes import SHAPES
from decmem.bench.operator_trial import SILENT, refusals
from decmem.bench.operators import OperatorBench
from decmem.bench.peers import PEERS, absent_peers, obstacle, present_peers
from decmem.cli import main
from decmem.commands.bench_ops import short_name, table_line
from decmem.ops import reference

CPU, SMALL = torch.device("cpu"), SHAPES["small"]


def bench(*ways: str, **changes: object) -> OperatorBench:
    made = OperatorBench([SMALL], [4], ways, CPU, torch.float32, repeats=1)
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_way_is_right_and_has_a_speed(dtype: torch.dtype) -> None:
    rows = list(bench("gather", "reference", "dense_flash", dtype=dtype).rows())
    assert [(row["backend"], row["pass"]) for row in rows] == [
        (way, which) for way in ("gather", "reference", "dense_flash")
        for which in ("forward", "backward")
    ]  # fmt: skip
    for row in rows:
        assert row["failure"] is None
        assert row["ms"] > 0
        assert 0 < row["error_of_pytorch"] < 10 * torch.finfo(dtype).eps
    assert [row["op"] for row in rows[::2]] == ["sgm", "sgm", "dense"]
    flop = SMALL.flop(SMALL.inputs(4, CPU, dtype))
    work = [row["tflops"] * row["ms"] * 1e9 for row in rows]
    assert work[:2] == pytest.approx([flop, 2.5 * flop], rel=1e-2)


def test_truth_is_the_definition() -> None:
    x = SMALL.inputs(4, CPU, torch.float64)
    problem = sparse_problem(x, SMALL)
    out = reference.block_sparse_attention(*problem.leaves, x.lists, x.valid)
    gradients = torch.autograd.grad(out, problem.leaves, x.grad)
    got = problem.truth(torch.float64, written_out)
    for one, other in zip(got, problem.part([out, *gradients]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)  # it computes in fp32
    for one, other in zip(got, problem.truth(torch.float64, fused), strict=True):
        torch.testing.assert_close(one, other)


def test_work_counts_tokens_that_exist() -> None:
    x = SMALL.inputs(4, CPU, torch.float32)
    assert x.valid is not None
    pairs = 0
    for world in range(SMALL.worlds):
        for head in range(SMALL.heads):
            for asking, row in enumerate(x.lists[world, head].tolist()):
                read = sum(SMALL.tokens[block % 2] for block in row)
                pairs += SMALL.tokens[asking % 2] * read
    assert sparse_problem(x, SMALL).flop == 4 * SMALL.head_dim * pairs
    dense = dense_problem(x, SMALL)
    queries, keys = 2 * 27, 4 * 27
    assert dense.leaves[0].shape == (2, 2, queries, SMALL.head_dim)
    assert dense.flop == 4 * 2 * 2 * queries * keys * SMALL.head_dim


def test_shapes_are_those_of_the_paper() -> None:
    paper = SHAPES["paper"]
    assert sum(paper.tokens) * 2 == 22 * 40
    assert (paper.slots, paper.listed, paper.heads * paper.head_dim) == (160, 80, 1728)
    assert len(paper.present(6, CPU)) == 880
    x = SMALL.inputs(9, CPU, torch.float32)
    assert x.lists.diff(dim=-1).gt(0).all()
    assert x.grad[:, :, 1, 13:].abs().max() == 0


def test_who_is_wrong_has_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator_ways.prepared

    def wrong(way: str, x: operators.OperatorInputs) -> operators.Attention:
        attention = right(way, x)
        return lambda q, k, v: 1.01 * attention(q, k, v)

    monkeypatch.setattr(operators, "prepared", wrong)
    for row in bench("gather", "dense_flash").rows():
        assert "wrong" in row["failure"]
        assert row["ms"] is None
        assert row["tflops"] is None
        assert row["error"] > 1e-3
        assert "wrong" in table_line(row)


def test_who_fails_says_so_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operator_ways.prepared

    def scarce(way: str, x: operators.OperatorInputs) -> operators.Attention:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("no room")

        return attention if way == "reference" else right(way, x)

    monkeypatch.setattr(operators, "prepared", scarce)
    rows = list(bench("reference", "hopper", "gather").rows())
    # What may take the process along comes last.
    assert [row["backend"] for row in rows[::2]] == ["reference", "gather", "hopper"]
    assert rows[0]["failure"] == "out of memory"
    assert rows[2]["failure"] is None
    assert rows[4]["failure"].startswith("UserError: backend")


def test_work_that_no_graph_can_hold_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def clock(work: object, device: torch.device, repeats: int, graph: bool = True) -> float:
        asked.append(graph)
        if graph:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 2.0

    monkeypatch.setattr(operators, "kernel_ms", clock)
    rows = list(bench("gather").rows())
    assert [row["ms"] for row in rows] == [2.0, 2.0]
    assert asked == [True, False, False]


def test_rows_are_refused_and_end_in_time() -> None:
    why = {("gather", "small", "backward"): "hung"}
    rows = list(bench("gather", refused=why).rows())
    assert [row["failure"] for row in rows] == [None, "hung"]
    assert all("time" in row["failure"] for row in bench("gather", until=0.0).rows())


def test_not_a_number_is_an_error() -> None:
    one = (torch.ones(3),)
    assert judged(one, [one], one).good
    assert not judged((torch.tensor([1.0, 1.0, float("nan")]),), [one], one).good


def test_twice_the_worst_of_pytorchs_errors_is_allowed() -> None:
    true = (torch.ones(3),)
    usual = [true, (torch.tensor([1.0, 1.0, 1.01]),)]
    good, bad = ((torch.tensor([1.0, 1.0, x]),) for x in (1.019, 1.021))
    assert judged(good, usual, true).good
    verdict = judged(bad, usual, true)
    assert not verdict.good
    assert (verdict.error, verdict.of_pytorch) == pytest.approx((0.021, 0.01), rel=1e-3)


def test_a_trial_tells_who_may_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # It finds the libraries that this process finds.
    (tmp_path / "sitecustomize.py").write_text(f"open({str(tmp_path / 'seen')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused = refusals(["gather", "hopper"], [SMALL], CPU, torch.float32, 60)
    assert set(refused) == {("hopper", "small", "forward"), ("hopper", "small", "backward")}
    assert (tmp_path / "seen").exists()
    # PyTorch alone takes longer to import.
    hung = refusals(["gather"], [SMALL], CPU, torch.float32, 0.0)
    assert set(hung.values()) == {SILENT}


def test_peers_that_are_missing_are_listed_with_the_reason() -> None:
    assert obstacle("json") is None
    assert obstacle("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    absent = {found["peer"]: found["reason"] for found in absent_peers()}
    assert "processor" in absent.pop("flashinfer-python")
    for name, peer in PEERS.items():
        assert (peer.package in absent) == (name not in present_peers())


def test_a_peer_that_is_not_there_is_a_row() -> None:
    for row in bench("vsa").rows():
        assert row["failure"]
        assert row["ms"] is None


@pytest.mark.parametrize(
    ("gpu", "short"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "4090"), (None, "cpu"),
    ],
)  # fmt: skip
def test_files_are_named_after_the_gpu(gpu: str | None, short: str) -> None:
    assert short_name(gpu) == short


def test_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--history", "4", "--repeats", "1", "--backends", "gather"]
    assert main(["bench", "ops", *options, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("ops_cpu_*.json")
    written = json.loads(path.read_text())
    assert written["theme"] == "ops"
    assert [row["pass"] for row in written["rows"]] == ["forward", "backward"]
    assert all(row["ms"] > 0 for row in written["rows"])
    assert written["absent"] == absent_peers()
    assert "| small | 4 | forward | gather |" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ["--history 0", "--repeats 0", "--backends none", "--device none"])
def test_bad_requests_exit_with_2(bad: str, tmp_path: Path) -> None:
    assert main(["bench", "ops", *bad.split(), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
