"""Drafters in a process that has transformers and not this package: they load, draft and save there as here."""

import os
import subprocess
import sys

import torch
from invariants import assert_same_drafter

from draft_opd_trl.core.sampling import Chooser
from draft_opd_trl.folders.checkpoints import load_drafter


ALONE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("draft_opd_trl", "trl"):
            raise ModuleNotFoundError(f"{name} is not installed here")
sys.meta_path.insert(0, Blocker())

from types import SimpleNamespace

import torch
from transformers import AutoModel, AutoModelForCausalLM

target_folder, folder, again, job = sys.argv[1:]
drafter = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
model = AutoModelForCausalLM.from_pretrained(target_folder)
config, embedding = model.config, model.get_input_embeddings()
sizes = {"hidden_size": config.hidden_size, "vocab_size": config.vocab_size, "num_layers": config.num_hidden_layers}
lent = {"embedding": embedding, "embed": embedding, "head": model.get_output_embeddings()}
drafter.bind(SimpleNamespace(name="the target", config=config, **sizes, **lent))

prompt = torch.load(job)
states = model(prompt, output_hidden_states=True).hidden_states
features = torch.cat([states[index + 1] for index in drafter.target_layer_ids], dim=-1)
state = drafter.start(1, 64)
positions = torch.arange(prompt.shape[1])[None]
drafter.extend(state, features, positions, prompt)
anchor = torch.tensor([[prompt.shape[1] - 1]])
proposal = drafter.propose(state, prompt[:, -1:], anchor, prompt.shape[1], lambda logits: (logits.argmax(-1), None))
drafter.save_pretrained(again)
assert not any(name.startswith("draft_opd_trl") for name in sys.modules)
torch.save({"state": drafter.state_dict(), "tokens": proposal.tokens}, job)
"""


ALONE_IN = (
    ALONE[: ALONE.index("target_folder, folder")]
    + """
drafter, told = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(told.values())
torch.save(drafter.state_dict(), sys.argv[2])
"""
)


@torch.no_grad()
def assert_drafts_alone(drafter, target, target_folder, tmp_path):
    """Saved, a drafter proposes the same in a process without this package, and saves itself there as it was."""
    drafter.save_pretrained(tmp_path / "drafter")
    prompt = torch.arange(3, 12)[None]
    torch.save(prompt, tmp_path / "job")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    arguments = [str(path) for path in (target_folder, tmp_path / "drafter", tmp_path / "again", tmp_path / "job")]
    command = [sys.executable, "-c", ALONE, *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = torch.load(tmp_path / "job")
    assert there["state"].keys() == drafter.state_dict().keys()
    assert all(torch.equal(value, there["state"][name]) for name, value in drafter.state_dict().items())
    # The same by hand in this process; the anchor is the prompt's last token.
    features, _ = target.forward_text(prompt, drafter.target_layer_ids)
    state, length = drafter.start(1, 64), prompt.shape[1]
    drafter.extend(state, features, torch.arange(length)[None], prompt)
    here = drafter.propose(state, prompt[:, -1:], torch.tensor([[length - 1]]), length, Chooser())
    assert torch.equal(there["tokens"], here.tokens)
    # Saved again from there, the folder is the same, code included.
    names = {path.name for path in (tmp_path / "drafter").iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "drafter" / name).read_bytes()
    assert_same_drafter(target, drafter, load_drafter(str(tmp_path / "again")))
