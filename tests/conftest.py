"""What every test run starts from."""

import gc
import os
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

# The tests read local folders only. Set before any Hugging Face library is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed builds extensions for one release of torch. In the default folder, another release may find them.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions" / version("torch")))

# Old releases with a fault, and the fault -> tests that meet it, as file::name without a class, or how these begin.
# There, they must fail.
FAULTS_OF_OLD_RELEASES = {
    ("transformers<5.18", "beams of the stock Marian end in an error: its logits lack the pad token"): [
        "tests/conversion/test_seq2seq_conversion.py"
        f"::test_generated_tokens_equal_those_of_the_stock_model[marian-settings2-options{number}]"
        for number in (1, 2)
    ],
    ("transformers<5.18", "a resumed run loads the optimizer onto `cpu:0`, which torch does not know"): [
        "tests/training/test_token_budget_mixin.py::test_two_processes",
        "tests/training/test_deepspeed.py::",
    ],
    ("transformers<5.20", "the suite passes a `device` to rotary positions, which ours do not take"): [
        "tests/modeling/test_modeling_common_suite.py::test_model_rope_scaling_frequencies"
    ],
    ("transformers<5.22", "the suite skips it for models whose files bear no year"): [
        "tests/modeling/test_modeling_common_suite.py::test_can_init_all_missing_weights"
    ],
    ("transformers<5.24", "the common suite lacks tests that tables name"): [
        f"tests/modeling/test_modeling_common_suite.py::test_tables_name_tests_of_the_suite[table{number}]"
        for number in (0, 6)
    ],
    ("huggingface_hub<2.2", "cards are validated by huggingface.co, whatever `HF_ENDPOINT` says"): [
        "tests/test_hub.py::test_a_card_stays_when_its_model_is_pushed_again"
    ],
    ("huggingface_hub<1.27", "a client that has failed to connect is closed, and used again"): [
        "tests/test_hub.py::test_an_unreachable_hub"
    ],
    ("trl<1", "SFTTrainer computes the entropy of logits, which models that train do not return"): [
        "tests/ecosystem/test_libraries.py::test_supervised_fine_tuning",
        "tests/ecosystem/test_libraries.py::test_packed_fine_tuning[bfd]",
        "tests/ecosystem/test_libraries.py::test_packed_fine_tuning[wrapped]",
    ],
}

# Old releases, and why they give a warning -> the filter that ignores it.
WARNINGS_OF_OLD_RELEASES = {
    ("datasets<5.2", "a CSV file that was read stays open"): "ignore:unclosed file:ResourceWarning",
}


def is_installed(release: str) -> bool:
    requirement = Requirement(release)
    try:
        return version(requirement.name) in requirement.specifier
    except PackageNotFoundError:
        return False


def pytest_configure(config: pytest.Config) -> None:
    for (release, _), warning in WARNINGS_OF_OLD_RELEASES.items():
        if is_installed(release):
            config.addinivalue_line("filterwarnings", warning)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m cuda` imports only the files that have such tests, so that not all libraries need be installed."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    wants_cuda_alone = config.getoption("markexpr") == "cuda"
    return True if wants_cuda_alone and is_test and "mark.cuda" not in collection_path.read_text() else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.filterwarnings(r"ignore:::torch\."))  # its compiler gives advice on speed
    for (release, fault), tests in FAULTS_OF_OLD_RELEASES.items():
        for item in items if is_installed(release) else ():
            if f"{item.nodeid.partition('::')[0]}::{item.name}".startswith(tuple(tests)):
                item.add_marker(pytest.mark.xfail(reason=f"{release}: {fault}"))


def pytest_collection_finish():
    """Each training collects garbage; the modules that are loaded by now are none, and need not be looked at again."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        if not has_cuda():
            pytest.skip("needs a CUDA device of compute capability 8.0")
        use_cublas_in_backward()


@cache
def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


@cache
def use_cublas_in_backward() -> None:
    """Uses cuBLAS in the thread of backward passes, which warns the first time that it has no CUDA context."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.ones(2, 2, device="cuda", requires_grad=True)
        (x @ x).sum().backward()
        torch.cuda.synchronize()
