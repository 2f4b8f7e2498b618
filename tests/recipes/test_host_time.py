"""The measurement of host time: a short run. No test depends on how long something takes, but numbers of operators do
not vary."""

import json
import math

import torch

import host_time

METHODS = ["padded", "unpadded", "flat", "dynmask", "dynmask, flat"]


def test_run(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        host_time.main(["--repeats", "1", "--output", str(tmp_path / "new" / "host_time.json")])
    finally:
        torch.set_num_threads(threads)
    records = json.loads((tmp_path / "new" / "host_time.json").read_text())["passes"]
    lines = capsys.readouterr().out.splitlines()[2:]
    printed = iter([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert [record["pass"] for record in records] == ["forward", "forward+backward"]
    for record in records:
        milliseconds, operators = record["milliseconds"], record["operators"]
        assert list(milliseconds) == list(operators) == METHODS
        assert all(math.isfinite(value) and value > 0 for value in milliseconds.values())
        for method in METHODS:
            name, printed_method, _, time, number, share = next(printed)
            assert (name, printed_method, number) == (record["pass"], method, str(operators[method]))
            assert time == f"{milliseconds[method] / milliseconds['padded']:.2f}"
            assert share == f"{operators[method] / operators['padded']:.2f}"
        assert max(operators["dynmask"], operators["dynmask, flat"]) <= operators["padded"]


def test_all_methods_compute_the_same():
    methods = host_time.make_methods()
    present = methods["padded"][1]["attention_mask"].bool()
    found = []
    for model, batch in methods.values():
        with torch.no_grad():
            logits = model(**batch).logits
        real = logits[present] if logits.shape[:2] == present.shape else logits[0]
        found.append(real)
    for real in found:
        torch.testing.assert_close(real, found[0])
