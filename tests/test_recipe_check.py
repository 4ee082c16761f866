"""Recipes that extend others, and `rlif recipe check` on every one that is here: batches, epochs, memory."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from services import epoch, recipe
from services.recipe import RecipeError

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
SHAPES = {
    "Qwen/Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "Qwen/Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, False),
    "Qwen/Qwen3-14B-Base": (5120, 40, 40, 8, 17408, 151936, False),
    "allenai/OLMo-2-1124-7B-SFT": (4096, 32, 32, 32, 11008, 100352, False),
    "meta-llama/Llama-3.2-3B-Instruct": (3072, 28, 24, 8, 8192, 128256, True),
}
"""Of the models' config.json: hidden, layers, heads, key heads, intermediate, vocabulary, tied."""
RANKS = {"14b": 64, "7b": 32}


def check(monkeypatch, capsys, *arguments: object) -> dict | str:
    """The JSON that `rlif recipe check` prints, or the line with which it refuses."""
    from services.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rlif", "recipe", "check", *map(str, arguments), "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    return json.loads(said.out) if not ended.value.code else said.err.strip().splitlines()[-1]


def write(path: Path, **tree) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


# ---- extends ---------------------------------------------------------------------------------------------------


def test_sections_are_merged_and_all_else_is_replaced(tmp_path):
    write(
        tmp_path / "base.yaml",
        run={"name": "base", "dir": "runs/base", "seed": 7},
        model={"path": "m"},
        data={"path": "d.jsonl", "fields": {"prompt": "q", "answer": "a"}},
        rollout={"sampling": {"temperature": 0.9, "max_tokens": 100}},
        rewards=[{"name": "a"}, {"name": "b"}],
        trainer={"steps": 4, "groups_per_step": 8},
    )
    write(tmp_path / "middle.yaml", extends="base.yaml", rewards=[{"name": "c"}], trainer={"steps": 5})
    (tmp_path / "sub").mkdir()
    last = write(
        tmp_path / "sub" / "last.yaml",
        extends="../middle.yaml",
        run={"name": "last"},
        data={"fields": None},
        rollout={"sampling": {"max_tokens": 7}},
    )
    made = recipe.load(last, ["trainer.groups_per_step=16"])
    assert (made.run.name, made.run.seed, str(made.run.dir)) == ("last", 7, "runs/base")
    assert (made.trainer.steps, made.trainer.groups_per_step) == (5, 16)
    assert (made.rollout.sampling.temperature, made.rollout.sampling.max_tokens) == (0.9, 7)
    assert [term.name for term in made.rewards] == ["c"] and made.data.fields is None
    assert recipe.parse(yaml.safe_load(recipe.dump(made))) == made


@pytest.mark.parametrize(
    ("extends", "says"),
    [
        ("b.yaml", "a.yaml: extends: goes in a circle: .*a.yaml -> .*b.yaml -> .*a.yaml"),
        ("a.yaml", "extends: goes in a circle"),
        ("../{folder}/b.yaml", "extends: goes in a circle"),
        ("gone.yaml", "cannot read recipe .*gone.yaml"),
        (["b.yaml"], "a.yaml: extends: names one other recipe file .got"),
        ("list.yaml", "list.yaml: is no YAML mapping to extend"),
    ],
)
def test_what_cannot_be_extended(tmp_path, extends, says):
    (tmp_path / "list.yaml").write_text("[1]")
    write(tmp_path / "b.yaml", extends="a.yaml")
    extends = extends.format(folder=tmp_path.name) if isinstance(extends, str) else extends
    with pytest.raises(RecipeError, match=says):
        recipe.load(write(tmp_path / "a.yaml", extends=extends))


def test_a_tree_that_was_not_read_from_a_file_extends_nothing():
    with pytest.raises(RecipeError, match="extends: unknown key"):
        recipe.parse({"extends": "base.yaml"})


def test_show_prints_the_merged_recipe(monkeypatch, capsys):
    from services.cli.main import main

    monkeypatch.setattr(sys, "argv", ["rlif", "recipe", "show", str(ROOT / "recipes" / "grpo_math_1.5b.yaml")])
    with pytest.raises(SystemExit):
        main()
    tree = yaml.safe_load(capsys.readouterr().out)
    assert "extends" not in tree and tree["model"]["path"] == "Qwen/Qwen2.5-1.5B"
    assert (tree["data"]["prompt"], tree["trainer"]["kl_beta"]) == ("intuitor-1.5b@1", 0.005)
    assert [(term["name"], term["weight"]) for term in tree["rewards"]] == [("math_verify", 1), ("self_certainty", 0)]


# ---- every recipe ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_passes(monkeypatch, capsys, tmp_path, path):
    """With the files made that its first lines say how to make, and a config.json in the model's place."""
    chosen = recipe.load(path)
    overrides = []
    if chosen.data.path.endswith(".jsonl"):
        row = {"prompt": "p", "answer": "2", "tests": [{"input": "1", "output": "2"}]}
        made = "".join(json.dumps({"id": str(number), **row}) + "\n" for number in range(5000))
        (tmp_path / "made.jsonl").write_text(made)
        overrides.append(f"data.path={tmp_path}/made.jsonl")
    arguments = []
    if chosen.model.path in SHAPES:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        shape = dict(zip((*names, "vocab_size", "tie_word_embeddings"), SHAPES[chosen.model.path], strict=True))
        (tmp_path / "config.json").write_text(json.dumps(shape))
        ranks = next((ranks for size, ranks in RANKS.items() if size in path.stem), 6)
        overrides += [f"model.path={tmp_path}", f"trainer.ranks={ranks}"]
        arguments = ["--gpu-gib", 80]
    found = check(monkeypatch, capsys, path, *overrides, *arguments)
    assert isinstance(found, dict), found
    doubts = ["top_p 1, top_k 50: completions are drawn from a part"] if "open-r1" in path.stem else []
    assert [expected in doubt for expected, doubt in zip(doubts, found["doubts"], strict=True)] == [True] * len(doubts)
    assert found["run"].replace("-", "_") in path.stem.replace("-", "_")
    assert found["steps_per_epoch"] >= 1
    if arguments:
        assert found["trainer_gib_per_rank"]["total"] < 80


def test_recipes_have_names_and_folders_of_their_own():
    loaded = [recipe.load(path) for path in SHIPPED]
    for of in (lambda one: one.run.name, lambda one: one.run.dir):
        assert len({of(one) for one in loaded}) == len(loaded)


def test_the_papers_values_stand():
    """Table of hyperparameters of arXiv 2505.19590, as its contradictions are resolved."""
    for name, values in {
        "intuitor_math_1.5b": (3e-6, 128, 7, 0.005, 58, 512, 3072, 0.9),
        "grpo_math_3b": (3e-6, 128, 7, 0.005, 58, 512, 3072, 0.9),
        "intuitor_math_7b": (1e-6, 64, 14, 0.01, 117, 512, 3072, 0.9),
        "grpo_math_qwen3_14b": (1e-6, 64, 14, 0.01, 117, 512, 3072, 0.9),
        "intuitor_code_3b": (1e-6, 64, 14, 0.01, 50, 1024, 2048, 0.9),
        "intuitor_math_3b-verl-compat": (3e-6, 128, 8, 0.005, 58, 512, 3072, 1.0),
    }.items():
        made = recipe.load(ROOT / "recipes" / f"{name}.yaml")
        trainer, rollout = made.trainer, made.rollout
        found = (trainer.learning_rate, trainer.groups_per_step, rollout.group_size, trainer.kl_beta, trainer.steps)
        found += (made.data.max_prompt_tokens, rollout.sampling.max_tokens, rollout.sampling.temperature)
        assert found == values, name
        assert (trainer.clip_low, trainer.clip_high, trainer.schedule, trainer.warmup) == (0.2, 0.2, "cosine", 0.1)


# ---- batches and epochs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "steps", "left"), [("intuitor_math_3b", 58, 76), ("intuitor_math_7b", 117, 12)])
def test_steps_per_epoch_are_as_published(monkeypatch, capsys, name, steps, left):
    found = check(monkeypatch, capsys, ROOT / "recipes" / f"{name}.yaml")
    assert (found["rows"], found["steps_per_epoch"], found["rows_left_over"]) == (7500, steps, left)
    assert found["published_steps_per_epoch"] == steps
    other = check(monkeypatch, capsys, ROOT / "recipes" / f"{name}.yaml", "--rows", 1000)
    assert other["rows"] == 1000 and "published_steps_per_epoch" not in other


def test_rows_are_counted_where_they_are(monkeypatch, capsys, tmp_path):
    import pyarrow
    from pyarrow import parquet

    gsm8k = ROOT / "recipes" / "gsm8k.yaml"
    assert check(monkeypatch, capsys, gsm8k)["rows"] == 7473
    assert "rows" not in check(monkeypatch, capsys, gsm8k, "data.path=somebody/else")
    row = {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n\n{json.dumps(row)}\n")
    parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "a.parquet")
    for name, rows in [("a.jsonl", 2), ("a.parquet", 3)]:
        found = check(monkeypatch, capsys, gsm8k, f"data.path={tmp_path}/{name}")
        assert found["rows"] == rows and "a step has tasks more than once" in found["doubts"][0]
    limited = check(monkeypatch, capsys, gsm8k, f"data.path={tmp_path}/a.parquet", "data.limit=1")
    assert limited["rows"] == 1
    told = check(monkeypatch, capsys, gsm8k, "data.path=somebody/else", "--rows", "50")
    assert told["rows"] == 50 and "the data has 50 rows" in told["doubts"][0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--completions", 4096], "no whole groups of rollout.group_size 14: 292 groups make 4088, 293 make 4102"),
        (["--completions", 1792], "are 128 groups of 14, and trainer.groups_per_step is 64"),
        (["trainer.ranks=1000"], "trainer.ranks: 1000, but a step has 896 completions"),
    ],
)
def test_batches_that_do_not_divide_are_refused(monkeypatch, capsys, arguments, says):
    path = ROOT / "recipes" / "intuitor_math_7b.yaml"
    refused = check(monkeypatch, capsys, path, *arguments)
    assert isinstance(refused, str) and says in refused
    assert check(monkeypatch, capsys, path, "--completions", 896)["completions_per_step"] == 896


def test_epochs_by_hand():
    made = recipe.load(ROOT / "recipes" / "intuitor_then_grpo_math_3b.yaml")
    assert epoch.facts(made, 7500)["epochs"] == round(116 * 128 / 7500, 2)


# ---- data ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch, capsys, tmp_path) -> Path:
    """Two problems as `rlif data prepare gsm8k` writes them, with their manifest."""
    from services.cli.main import main

    rows = [{"question": f"{n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in (1, 2)]
    (tmp_path / "source.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        "data",
        "prepare",
        "gsm8k",
        tmp_path / "made.jsonl",
        "--file",
        tmp_path / "source.jsonl",
        "--no-verify",
    ]
    monkeypatch.setattr(sys, "argv", ["rlif", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    capsys.readouterr()
    return tmp_path / "made.jsonl"


GSM8K, CODE = ROOT / "recipes" / "gsm8k.yaml", ROOT / "recipes" / "grpo_code_3b.yaml"
TAKEN_BACK = ("data.fields=null", "data.answer_pattern=null")


def test_prepared_data_is_read_as_the_run_reads_it(monkeypatch, capsys, prepared):
    path = f"data.path={prepared}"
    assert check(monkeypatch, capsys, GSM8K, path, *TAKEN_BACK)["rows"] == 2
    one = prepared.with_name("one.jsonl")
    one.write_text('{"prompt": "3 + 3?", "answer": "6"}\n')
    evaluation = f"evaluation={{data: {{path: {one}}}, every: 50, rewards: grpo}}"
    assert check(monkeypatch, capsys, GSM8K, path, *TAKEN_BACK, evaluation)["rows"] == 2
    other = "line 1: no field 'question'; it has 'id', 'source', 'prompt', 'answer'"
    assert other in check(monkeypatch, capsys, GSM8K, path)
    no_tests = "rewards: 'code_tests' needs the reference tests, which no row of"
    assert no_tests in check(monkeypatch, capsys, CODE, path)
    prompt = (*TAKEN_BACK, "data.prompt=code-contests@1")
    assert check(monkeypatch, capsys, GSM8K, path, *prompt)["rows"] == 2
    lines = prepared.read_text().splitlines()
    row = json.loads(lines[0])
    messages = {"id": "m", "messages": [{"role": "user", "content": row["prompt"]}], "answer": "2"}
    whole = prepared.with_name("whole.jsonl")
    whole.write_text(json.dumps(messages) + "\n")
    assert "holds whole messages" in check(monkeypatch, capsys, GSM8K, f"data.path={whole}", *prompt)
    prepared.write_text("\n".join(lines[:1]))
    assert "has changed since it was prepared" in check(monkeypatch, capsys, GSM8K, path, *TAKEN_BACK)


@pytest.mark.parametrize(("lacking", "of"), [(1, 4), (2, 7)])
def test_what_some_rows_lack_is_doubtful_and_what_many_do_is_refused(monkeypatch, capsys, tmp_path, lacking, of):
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1) if n >= lacking else None} for n in range(of)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ("trainer.groups_per_step=2", "rollout.groups_per_request=1")
    found = check(monkeypatch, capsys, GSM8K, f"data.path={path}", *TAKEN_BACK, *small)
    line = f"rewards: 'math_verify' needs the reference answer, which {lacking} of {of} rows of '{path}' lack"
    remedy = "take them out (`rlif data prepare` does of math and code_contests), or keep the reward off them"
    if lacking == 1:
        fate = "groups are made of them, refused by the reward server and given up, and 11 in a row end the run"
        assert found["doubts"] == [f"{line}: {fate}; {remedy} by `sources`"]
    else:
        assert found == f"rlif: {line}, more than a quarter; {remedy} by `sources`"
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[lacking:]))
        held_out = f"evaluation={{data: {{path: {path}}}, every: 50, rewards: grpo}}"
        found = check(monkeypatch, capsys, GSM8K, f"data.path={tmp_path}/train.jsonl", *TAKEN_BACK, *small, held_out)
        assert found["doubts"] == [f"evaluation.{line}: they are left out of every evaluation"]


def test_data_may_be_absent_where_its_rows_are_told(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    held_out = "evaluation={data: {path: held.jsonl}, every: 50, rewards: grpo}"
    found = check(monkeypatch, capsys, CODE, held_out, "--rows", 900)
    assert isinstance(found, dict) and found["rows"] == 900
    (tmp_path / "code_contests.jsonl").write_text('{"text": "Sort."}\n')
    assert "code_contests.jsonl" in check(monkeypatch, capsys, CODE, held_out, "--rows", 900)


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("demo", [], "no file 'runs/demo/train.jsonl'; `rlif demo-prepare DIR` makes DIR/train.jsonl, and"),
        ("grpo_code_3b", [], "; `rlif data prepare code_contests code_contests.jsonl` makes one"),
        ("gsm8k", ["data.path=a.jsonl", "data.source=mine"], "data.path: there is no file 'a.jsonl'"),
        ("gsm8k", ["data.path=./mine"], "data.path: there is no file or folder './mine'"),
        (
            "gsm8k",
            ["evaluation={data: {path: held.jsonl}, every: 50, rewards: grpo}"],
            "evaluation.data.path: there is",
        ),
    ],
)
def test_data_that_is_missing_is_refused_with_what_makes_it(monkeypatch, capsys, tmp_path, name, overrides, says):
    monkeypatch.chdir(tmp_path)
    refused = check(monkeypatch, capsys, ROOT / "recipes" / f"{name}.yaml", *overrides)
    assert isinstance(refused, str) and says in refused
    assert refused.endswith("'a.jsonl'") or "mine" not in " ".join(overrides) or "./mine" in refused


def test_a_file_that_may_not_be_read_is_refused(monkeypatch, capsys, prepared):
    opened = Path.open

    def forbidden(path, *arguments, **options):
        """The tests may run as root, who may read everything."""
        if path == prepared:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    for _ in ("with its manifest", "without"):
        refused = check(monkeypatch, capsys, GSM8K, f"data.path={prepared}", *TAKEN_BACK)
        assert refused == f"rlif: data.path: '{prepared}' cannot be read: Permission denied"
        prepared.with_name("made.jsonl.manifest.json").unlink(missing_ok=True)
