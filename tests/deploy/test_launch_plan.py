"""Who runs where on several machines, what is refused, and how the nodes of one start meet and end."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from cluster_recipe import write_recipe

from services import recipe as recipes
from services.address import bound
from services.launch import credentials, node, plan
from services.launch.board import Board, Ended, Outcome
from services.launch.parts import Node, Workplace
from services.recipe import RecipeError
from services.startup import StartupError

ROOT = Path(__file__).parent.parent.parent
JOBS = {"intuitor_math_7b": 5, "grpo_math_7b": 5, "intuitor_math_14b": 9, "grpo_math_14b": 9}


def load(name: str, *overrides: str) -> recipes.Recipe:
    return recipes.load(ROOT / "recipes" / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize(("name", "nodes"), JOBS.items())
def test_the_four_published_jobs(name, nodes):
    recipe = load(name)
    made = plan.make(recipe, nodes, 8)
    assert made.ranks == (nodes - 1) * 8
    assert made.trainer_nodes == list(range(1, nodes))
    assert [part.kind for part in made.nodes[0]] == ["redis", *["rollout"] * 3, "reward", "orchestrator"]
    dealt = [gpu for part in made.nodes[0] for gpu in part.gpus]
    assert dealt == list(range(8))
    assert plan.fill(recipe, made).trainer.ranks == made.ranks
    # The paper's table: 64 problems of 14 completions, one epoch of MATH's 7,500.
    assert (recipe.trainer.groups_per_step, recipe.rollout.group_size, recipe.trainer.steps) == (64, 14, 117)
    assert 7500 // recipe.trainer.groups_per_step == recipe.trainer.steps
    assert (recipe.trainer.learning_rate, recipe.trainer.kl_beta, recipe.rollout.sampling.temperature) == (
        1e-6,
        0.01,
        0.9,
    )


def test_the_jobs_of_one_size_differ_in_their_reward_alone():
    for size in ("7b", "14b"):
        one, other = (load(f"{kind}_math_{size}").model_dump(mode="json") for kind in ("intuitor", "grpo"))
        weights = [{term["name"]: term["weight"] for term in each.pop("rewards")} for each in (one, other)]
        assert weights == [{"self_certainty": 1, "math_verify": 0}, {"math_verify": 1, "self_certainty": 0}]
        assert one.pop("run")["seed"] == other.pop("run")["seed"]
        assert one == other


@pytest.mark.parametrize(
    ("nodes", "gpus", "overrides", "said"),
    [
        (
            5,
            8,
            ["rollout.group_size=7", "trainer.groups_per_step=4"],
            "4 x 7 = 28 completions leave some of 32 ranks (4 trainer node(s) x 8) without any",
        ),
        (5, 8, ["rollout.tensor_parallel_size=16"], "rollout.tensor_parallel_size: 16, but a node has 8 GPUs"),
        (5, 8, ["trainer.ranks=24"], "trainer.ranks: 24, but 4 trainer node(s) x 8 make 32"),
        (5, 8, ["scorer.gpus=[0,1]"], "scorer.gpus: [0, 1] is for `rlif up`"),
        (1, 8, [], "the servers take 8 GPUs of the node's 8, which leaves none to train on; use --nodes 2"),
        (3, 2, ["scorer.replicas=2"], "take 5 nodes of 2 GPUs, which leaves none to train on; use --nodes 6"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(nodes, gpus, overrides, said):
    with pytest.raises(RecipeError) as refusal:
        plan.make(load("intuitor_math_7b", *overrides), nodes, gpus)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_completions_need_not_divide_among_the_ranks():
    assert plan.make(load("intuitor_math_7b"), 6, 8).ranks == 40  # 896 completions, 22 or 23 a rank


def test_a_server_stays_on_one_node_and_one_node_shares_its_gpus():
    made = plan.make(load("intuitor_math_7b", "rollout.tensor_parallel_size=3", "scorer.tensor_parallel_size=1"), 4, 4)
    assert [[(part.kind, part.gpus) for part in parts if part.gpus] for parts in made.nodes[:3]] == [
        [("rollout", (0, 1, 2)), ("reward", (3,))],
        [("rollout", (0, 1, 2))],
        [("rollout", (0, 1, 2))],
    ]
    alone = plan.make(load("intuitor_math_7b", "rollout.replicas=1"), 1, 8)
    assert [part.gpus for _, part in alone.of("rollout", "reward", "trainer")] == [(0, 1), (2, 3), (4, 5, 6, 7)]
    assert alone.ranks == 4


def test_servers_and_redis_of_somebody_else_are_left_to_them():
    elsewhere = ["rollout.urls=[http://a:1]", "scorer.urls=[http://b:2]", "queue.url=redis://c:6379"]
    made = plan.make(load("intuitor_math_7b", *elsewhere), 2, 8)
    assert [[part.kind for part in parts] for parts in made.nodes] == [["trainer", "orchestrator"], ["trainer"]]


# ---- the board ---------------------------------------------------------------------------------------------------


def test_the_first_outcome_counts_and_ends_every_wait(tmp_path):
    board = Board(tmp_path, "a")
    board.post("node-0", {"name": "n1"})
    assert board.gather(["node-0"], 1) == [{"name": "n1"}]
    with pytest.raises(TimeoutError, match="node-1"):
        board.gather(["node-0", "node-1"], 0.1)
    assert board.settle(Outcome(2, "no such model", "n2")).code == 2
    assert Board(tmp_path, "a").settle(Outcome(0, "done", "n1")) == Outcome(2, "no such model", "n2")
    with pytest.raises(Ended, match="node n2: no such model"):
        board.gather(["node-1"], 60)
    assert stat.S_IMODE(board.folder.stat().st_mode) == 0o700


def quiet(_services: object) -> None:
    """No progress."""


def filled(tmp_path: Path, nodes: int, *overrides: str) -> Path:
    chosen = recipes.load(write_recipe(tmp_path, Path("model"), steps=1), list(overrides))
    ready = plan.fill(chosen, plan.make(chosen, nodes, 0))
    ready.run.dir.mkdir(exist_ok=True)
    (ready.run.dir / "recipe.yaml").write_text(recipes.dump(ready))
    credentials.write(ready.run.dir)
    return ready.run.dir


@pytest.fixture
def own_environment(monkeypatch):
    for name in credentials.NAMES:
        monkeypatch.setenv(name, "")  # put back at the end, whatever the test sets


def test_a_run_that_the_guard_stopped_has_failed(tmp_path):
    assert node._end(tmp_path, 0) == (0, "training is done")
    (tmp_path / "stopped.txt").write_text("by the collapse guard: step 7: entropy is 0.1\n")
    assert node._end(tmp_path, 0) == (1, "stopped by the collapse guard: step 7: entropy is 0.1")
    assert node._end(tmp_path, 143)[0] == 143


@pytest.mark.usefixtures("own_environment")
def test_a_node_that_nobody_joins_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "MUSTER_SECONDS", 0.5)
    run_dir = filled(tmp_path, 2)
    with pytest.raises(StartupError, match="n1 sees nothing of node-1 in .*shared file system"):
        node.run_node(run_dir / "recipe.yaml", 2, 0, 0, "n1", "127.0.0.1", "a", None, quiet)
    settled = json.loads((run_dir / "cluster" / "a" / "outcome.json").read_text())
    assert settled["code"] == 2


def test_a_node_without_the_runs_folder_says_so(tmp_path):
    with pytest.raises(
        StartupError, match="node n2: cannot read recipe .*run.dir has to be a folder that all nodes share"
    ):
        node.run_node(tmp_path / "recipe.yaml", 2, 0, 1, "n2", "127.0.0.1", "a", None, quiet)


@pytest.mark.usefixtures("own_environment")
def test_a_second_start_of_a_run_is_refused(tmp_path):
    from services.run_folder import only_one

    run_dir = filled(tmp_path, 2)
    with only_one(run_dir), pytest.raises(StartupError, match="another"):
        node.run_node(run_dir / "recipe.yaml", 2, 0, 0, "n1", "127.0.0.1", "a", None, quiet)
    with pytest.raises(Ended, match="node n1"):  # what the other nodes learn
        Board(run_dir, "a").gather(["node-0"], 60)


# ---- the processes -----------------------------------------------------------------------------------------------


def workplace(run_dir: Path, number: int, nodes: int = 3, gpus: int = 0) -> Workplace:
    chosen = recipes.load(run_dir / "recipe.yaml")
    made = plan.make(chosen, nodes, gpus)
    ports = [{part.name: 1000 * (n + 1) + k for k, part in enumerate(parts)} for n, parts in enumerate(made.nodes)]
    crew = [Node(f"n{n + 1}", f"10.0.0.{n + 1}", ports[n]) for n in range(nodes)]
    return Workplace(chosen, run_dir / "recipe.yaml", made, crew, number, "job-7-0", "sesame")


@pytest.mark.usefixtures("own_environment")
def test_no_secret_is_in_an_argument_list_or_a_file_for_others(tmp_path):
    run_dir = filled(tmp_path, 3)
    password = credentials.take(run_dir)
    secrets = [password, os.environ["RLIF_API_TOKEN"], os.environ["RLIF_ADMIN_TOKEN"], "sesame"]
    assert len(set(secrets)) == 4 and all(len(secret) > 40 for secret in secrets[:3])
    services = [service for number in range(3) for service in workplace(run_dir, number).services()]
    said = " ".join(part for service in services for part in [*service.argv, *service.env.values()])
    assert not any(secret in said for secret in secrets)
    holding = [path for path in run_dir.rglob("*") if path.is_file() and any(s in path.read_text() for s in secrets)]
    assert {path.name for path in holding} == {"redis.conf", "credentials.json"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holding)


def test_the_trainers_meet_at_the_first_trainer_node(tmp_path):
    run_dir = filled(tmp_path, 3)
    first, second = (workplace(run_dir, number).services()[0].argv for number in (1, 2))
    for argv in (first, second):
        train = argv.index("train")
        assert argv[train + 1 : train + 3] == [str(run_dir / "recipe.yaml"), "--resume"]
    at = ["--leader", "10.0.0.2:2000"]
    assert first[-6:] == ["--nodes", "2", "--node-rank", "0", *at]
    assert second[-6:] == ["--nodes", "2", "--node-rank", "1", *at]
    begun = replace(workplace(run_dir, 1), resume_from=Path("/models/base")).services()[0].argv
    assert begun[begun.index("--resume") + 1 :] == ["--resume-from", "/models/base", *first[-6:]]
    orchestrator = workplace(run_dir, 0).services()[-1]
    assert orchestrator.argv[-2:] == ["rollout.urls=[http://10.0.0.1:1001]", "scorer.urls=[http://10.0.0.1:1002]"]


def test_gpus_are_dealt_by_the_names_the_scheduler_gives(tmp_path, monkeypatch):
    run_dir = filled(tmp_path, 2, "rollout.replicas=2")
    text = (run_dir / "recipe.yaml").read_text().replace("ranks: 1", "ranks: 4")
    (run_dir / "recipe.yaml").write_text(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    shown = {each.name: each.env.get("CUDA_VISIBLE_DEVICES") for each in workplace(run_dir, 0, 2, 4).services()}
    assert shown == {
        "redis": None, "rollout-0": "GPU-a", "rollout-1": "GPU-b", "reward-0": "GPU-c", "orchestrator": None
    }  # fmt: skip
    assert workplace(run_dir, 1, 2, 4).services()[0].env["CUDA_VISIBLE_DEVICES"] == "GPU-a,GPU-b,GPU-c,GPU-d"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(StartupError, match="node n1: 2 GPUs .*planned are 4"):
        workplace(run_dir, 0, 2, 4).services()


def test_a_node_named_by_number_listens_there_alone():
    assert [bound(host) for host in ("127.0.0.1", "10.1.2.3", "fe80::1")] == ["127.0.0.1", "10.1.2.3", "fe80::1"]
    assert bound("gpu-17.cluster") == "0.0.0.0"


def test_secrets_go_when_training_is_done(tmp_path):
    run_dir = filled(tmp_path, 1)
    workplace(run_dir, 0, 1).services()
    assert {path.name for path in run_dir.rglob("*") if path.name in ("credentials.json", "redis.conf")} != set()
    credentials.remove(run_dir)
    assert not (run_dir / "cluster" / "credentials.json").exists() and not (run_dir / "redis" / "redis.conf").exists()
