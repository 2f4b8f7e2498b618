"""The top of `recipes/` holds scripts, and each that trains shows what there is to copy in one piece."""

import ast
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPTS = sorted(RECIPES.glob("*.py"))
TRAINING = [path for path in SCRIPTS if "train_and_report(" in path.read_text()]
MEASURES = dict.fromkeys(["Trainer", "Seq2SeqTrainer", "MaskedLMTrainer"], {"data_collator", "compute_metrics"})
MEASURES |= dict.fromkeys(["SentenceTransformerTrainer", "CrossEncoderTrainer"], {"loss", "evaluator"})  # with data
MOST_LINES = 45  # from `main` to the end of its `Trainer`


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_it_can_be_run(path):
    tree = ast.parse(path.read_text())
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
    usage = f"python recipes/{path.name}"
    assert usage in (ast.get_docstring(tree) or "")


def test_eleven_recipes_train():
    assert len(TRAINING) == 11


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_data_model_collator_and_trainer_are_in_one_piece(path):
    functions = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    main = functions[0]
    assert main.name == "main"
    calls = [node for node in ast.walk(main) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (trainer,) = [call for call in calls if ast.unparse(call.func) in MEASURES]
    assert {"train_dataset", *MEASURES[ast.unparse(trainer.func)]} <= {keyword.arg for keyword in trainer.keywords}
    assert trainer.end_lineno is not None
    assert trainer.end_lineno - main.lineno < MOST_LINES
