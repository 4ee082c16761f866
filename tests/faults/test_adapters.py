"""A whole run with adapters by the real trainer: what it publishes, saves and goes on from are the same weights."""

import shutil

import pytest
import yaml
from safetensors.torch import load_file
from test_lora import SETTINGS
from test_trainer import Run
from test_weights import same

from services.contract import Version, WeightVersion
from services.weights.mirror import whole
from trainer.export import export


@pytest.mark.faults
def test_a_run_publishes_its_adapters_and_goes_on_with_them(tiny_model, redis_url, tmp_path):
    run = Run(tmp_path, tiny_model, f"{redis_url}?db=3", "adapters", steps=2)
    tree = yaml.safe_load(run.recipe_path.read_text())
    tree["model"]["lora"] = SETTINGS
    run.recipe_path.write_text(yaml.safe_dump(tree))
    run.dir.mkdir()
    (run.dir / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run.push(0, 4)
    assert run.start().end() == 0, run.log.read_text()[-4000:]
    assert run.start("--resume").end() == 0, run.log.read_text()[-4000:]
    found = {}
    for name in ("0-2", "1-2"):
        weights = WeightVersion.model_validate_json((run.dir / "weights" / name / "manifest.json").read_bytes())
        with whole(weights, lambda: tiny_model) as folder:
            found[name] = load_file(folder / "model.safetensors")
    assert weights.transport == "adapter" and same(found["0-2"], found["1-2"])
    assert not same(found["1-2"], load_file(tiny_model / "model.safetensors"))
    assert export(run.dir, tmp_path / "published") == Version(lineage=1, version=2)
    shutil.rmtree(run.dir / "weights")
    assert export(run.dir, tmp_path / "saved") == Version(version=2)
    for folder in ("published", "saved"):
        assert same(load_file(tmp_path / folder / "model.safetensors"), found["1-2"])
