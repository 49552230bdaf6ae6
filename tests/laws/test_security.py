"""What a run trusts: no code out of files, no secrets in what it writes, nothing written outside its folder, no open door."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_dist.cli.main import main
from rlhf_dist.config.dpo import DPOConfig
from rlhf_dist.config.engines import EngineSection
from rlhf_dist.config.errors import UserError
from rlhf_dist.config.ppo import PPOConfig
from rlhf_dist.config.reward_model import RewardModelConfig
from rlhf_dist.config.rewards import RewardSection
from rlhf_dist.config.scoring import ScoringConfig
from rlhf_dist.config.section import Section
from rlhf_dist.config.sft import SFTConfig
from rlhf_dist.engines.consolidation import read_shards
from rlhf_dist.models.loading import load_causal_lm
from rlhf_dist.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "rlhf_dist").rglob("*.py"))
OWN_PROCESSES = {
    "rewards/child.py": "requests of the process that started it; answers go back as JSON",
    "workers/ray_group.py": "answers of the run's own actors",
    "workers/spmd_group.py": "answers of this very process",
    "workers/wire.py": "arguments of the run's own coordinator",
    "workers/weight_carriers.py": "tickets of the run's own ranks",
    "workers/weight_link.py": "tickets of the run's own ranks",
}
"""The modules that unpickle, and from whom: processes of the same run, never a file."""
TOKEN = "t0p-s3cret-4711"


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in the package: module, dotted name, node."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield path.relative_to(ROOT / "rlhf_dist").as_posix(), ast.unparse(node.func), node


def keywords(node: ast.Call) -> dict[str | None, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}


def test_pickles_come_from_processes_of_the_run_alone() -> None:
    found = {module for module, name, _ in calls() if re.fullmatch(r"(cloud)?pickle\.(loads?|Unpickler)|Unpickler", name)}
    assert found <= OWN_PROCESSES.keys(), "a module unpickles: from whom? A file may come from anybody"
    files = [
        (module, name)
        for module, name, _ in calls()
        if re.search(r"(^|\.)(joblib|dill|shelve|marshal|cPickle)\.|^pickle\.load$|read_pickle", name)
    ]
    assert not files, "these run code out of a file"


def test_torch_reads_data_only() -> None:
    loads = [(module, keywords(node)) for module, name, node in calls() if name == "torch.load"]
    assert loads and all(given.get("weights_only") == "True" for _, given in loads)


def test_no_code_is_made_of_text_and_no_shell_reads_it() -> None:
    for module, name, node in calls():
        where = f"{module}:{node.lineno}"
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen", "__import__"), where
        assert keywords(node).get("shell", "False") == "False", where
        assert not re.fullmatch(r"yaml\.(load|load_all|full_load|unsafe_load)", name), where


def test_yaml_is_read_in_one_place() -> None:
    """By the module that refuses tags, doubled keys and what unfolds without end."""
    readers = {module for module, name, _ in calls() if re.match(r"yaml\.(safe_load|SafeLoader|load|compose)", name)}
    assert readers == {"config/yaml_text.py"}


def sections(kind: type[Section]) -> Iterator[type[Section]]:
    yield kind
    for each in kind.__subclasses__():
        yield from sections(each)


def test_code_in_model_folders_is_off_unless_asked() -> None:
    assert {PPOConfig, SFTConfig, RewardModelConfig, DPOConfig, ScoringConfig, RewardSection} <= set(sections(Section))
    switches = [kind.model_fields["trust_remote_code"].default for kind in sections(Section) if "trust_remote_code" in kind.model_fields]
    assert len(switches) >= 2 and not any(switches)
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg | ast.keyword) and node.arg == "trust_remote_code" and isinstance(node, ast.keyword):
                assert ast.unparse(node.value) != "True", path
            if isinstance(node, ast.FunctionDef):
                defaults = dict(zip((arg.arg for arg in node.args.kwonlyargs), node.args.kw_defaults, strict=True))
                given = defaults.get("trust_remote_code")
                assert given is None or ast.unparse(given) == "False", f"{path}: {node.name}"


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


def test_a_model_of_pickled_weights_is_refused_unread(tiny_model: Path, tmp_path: Path) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(sprung)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_causal_lm(EngineSection(), str(folder))
    assert not sprung.exists()


def test_a_model_that_ships_code_is_not_run(tiny_model: Path, tmp_path: Path) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    with pytest.raises(UserError):
        load_causal_lm(EngineSection(), str(folder))
    assert not sprung.exists()


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    (tmp_path / "latest").write_text("tag")
    (tmp_path / "tag").mkdir()
    torch.save({"module": Trap(sprung)}, tmp_path / "tag" / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="could run code"):
        read_shards(tmp_path)
    assert not sprung.exists()
    with pytest.raises(FileExistsError):  # the trap works
        sprung.mkdir()
        pickle.loads(pickle.dumps(Trap(sprung)))


class Judge(BaseHTTPRequestHandler):
    """Answers who brings the token; fails one row of each request, so that samples go to quarantine."""

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == f"Bearer {TOKEN}"
        rewards: list[Any] = [float(len(text)) for text in rows["completions"]]
        rewards[0] = {"error": f"no number; you said {self.headers['Authorization']}"}
        content = json.dumps({"rewards": rewards}).encode() if known else b"who are you?"
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def holding(folder: Path, secret: str) -> list[str]:
    """Files under a folder with the secret in them."""
    return [str(path) for path in sorted(folder.rglob("*")) if path.is_file() and secret.encode() in path.read_bytes()]


def test_a_token_is_in_nothing_that_a_run_leaves(
    ppo_values: dict[str, Any], tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in the folder of a run that ends well, with failed rows, checkpoints and rollouts; nor in what either run says."""
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    source = {
        "kind": "http",
        "name": "judge",
        "url": judge,
        "auth_env": "JUDGE_TOKEN",
        "on_failure": "default",
        "default": 0.5,
        "retries": 0,
    }
    ppo_values["reward"] = {"sources": [source]}
    ppo_values["checkpoint"] = {"every": 1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(ppo_values))
    main(["ppo", "--config", str(path)])
    folder = tmp_path / "runs" / "test"
    quarantine = (folder / "quarantine.jsonl").read_text()
    assert "you said" in quarantine and (folder / "checkpoints").is_dir() and (folder / "summary.json").is_file()
    said = capfd.readouterr()
    assert holding(tmp_path, TOKEN) == [] and TOKEN not in said.out + said.err
    monkeypatch.setenv("JUDGE_TOKEN", f"{TOKEN}-of-another")
    ppo_values["run"] |= {"name": "refused"}
    ppo_values["reward"]["sources"][0] |= {"on_failure": "raise", "default": None}
    path.write_text(yaml.safe_dump(ppo_values))
    with pytest.raises(SystemExit):
        main(["ppo", "--config", str(path)])
    said = capfd.readouterr()
    assert "401" in said.err and TOKEN not in said.out + said.err and holding(tmp_path, TOKEN) == []


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "..", ".", "", "a\0b", "a\nb", "~", "a\\b"])
def test_a_run_cannot_be_named_out_of_its_folder(ppo_values: dict[str, Any], tmp_path: Path, name: str) -> None:
    ppo_values["run"]["name"] = name
    path = tmp_path / "config" / "run.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(ppo_values))
    with pytest.raises(SystemExit) as ended:
        main(["ppo", "--config", str(path)])
    assert ended.value.code == 2
    assert [each for each in tmp_path.rglob("*") if each.is_file() and each.parent != path.parent] == []


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "/x", "..", "", "a\n"])
def test_rewards_name_no_files(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        RewardSection.model_validate({"sources": [{"kind": "function", "name": name, "path": "m:f"}]})


def test_a_folder_that_is_not_of_a_run_is_never_emptied(tmp_path: Path) -> None:
    """Neither itself, nor through a link that has the name of a run."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tmp_path / "home")
    for overwrite, resume in ((True, False), (False, True), (False, False)):
        with pytest.raises(UserError):
            RunFolder.create(tmp_path / "runs", "mine", overwrite=overwrite, resume=resume)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter"]


def test_a_link_to_the_folder_of_another_run_does_not_empty_it(tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path / "elsewhere", "other")
    other.config.write_text("kept")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(other.root)
    with pytest.raises(UserError, match="link"):
        RunFolder.create(tmp_path / "runs", "mine", overwrite=True)
    assert other.config.read_text() == "kept"


def test_containers_publish_on_this_machine_only() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) >= 2 and all(str(port).startswith("127.0.0.1:") for port in ports)
    assert all("network_mode" not in service and not service.get("privileged") for service in services.values())


def test_a_cluster_that_a_run_starts_asks_for_a_token() -> None:
    """tests/cli/test_clusters.py tries the door; here: no other place starts one, and none without the token."""
    starts = {module for module, name, _ in calls() if name == "ray.init"}
    assert starts == {"cli/clusters.py"}
    launching = (ROOT / "rlhf_dist" / "cli" / "launching.py").read_text()
    assert launching.index("with_a_token()\n") < launching.index("run_under_ray(program)")


def test_nothing_listens_on_all_addresses() -> None:
    text = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in SOURCES}
    assert [name for name, source in text.items() if "0.0.0.0" in source or "HTTPServer(" in source] == []
