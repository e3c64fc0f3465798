"""Settings that are right each by itself and cannot stand together: each pair with its value, reason and remedy."""

import pytest

from draft_opd_trl.training.config import DraftOPDConfig


RELOADING = {"rollout_source": "server", "server_url": "http://x", "server_reload_steps": 4}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rejected_weight": 1.0, "rejected_loss": "accepted_length"}, "Use it for the accepted stream only"),
        ({"rollout_source": "server"}, "rollout_source='server' and server_url=None do not go together.*Set both"),
        ({"server_url": "http://x"}, "rollout_source='speculation' and server_url='http://x' do not go together"),
        (
            {"server_reload_steps": 4, "server_reload_command": "true"},
            "server_reload_steps=4, server_reload_command='true' and rollout_source='speculation' do not go together",
        ),
        (
            {"rollout_source": "server", "server_url": "http://x", "server_reload_steps": 4},
            "server_reload_command=None and rollout_source='server' do not go together.*Set both",
        ),
        (
            {**RELOADING, "server_reload_command": "no-such-program --now"},
            "server_reload_command='no-such-program --now' names no program.*Give its path",
        ),
        ({**RELOADING, "server_reload_command": "sh 'open"}, "cannot be read .*Correct its quotes"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 6},
            "steps_per_generation=6 is not a multiple of gradient_accumulation_steps=4, so a text.*Make it one",
        ),
        ({"accepted_weight": 0.0}, "accepted_weight and rejected_weight are both 0.*Set one above 0"),
        (
            {"accepted_loss": "forward_kl"},
            "accepted_loss='forward_kl' compares distributions, but teacher_temperature=0.*Use one of ce, tv, lk",
        ),
        (
            {"rejected_loss": "k3", "rejected_weight": 0.5},
            "rejected_loss='k3' compares distributions, but teacher_temperature=0.*Use one of ce, tv, lk",
        ),
        (
            {"state_store_gib": 1.0, "rejected_weight": 0.5},
            r"state_store_gib=1.0, but the rejected stream \(rejected_weight=0.5\) reads the target's keys.*to 0",
        ),
        ({"state_store_dir": "states"}, "state_store_gib=0 keeps none. Set it"),
        ({"replay_ratio": 0.5}, "replay_ratio=0.5 draws from a buffer of size 0. Set replay_buffer_size above 0"),
        (
            {"replay_by_loss": True, "replay_buffer_size": 8},
            "replay_by_loss=True, but replay_ratio=0 draws nothing. Set replay_ratio above 0",
        ),
        (
            {"lmbda": 0.0, "replay_ratio": 0.5, "replay_buffer_size": 8},
            r"lmbda=0 \(SFT\) exposes no error positions for replay_ratio > 0",
        ),
        (
            {"lmbda": 0.0, "anchors": "random"},
            r"anchors='random' says where.*lmbda=0 \(SFT\) has none.*Leave anchors at 'exposed', or set lmbda above 0",
        ),
        (
            {"anchors": "random", "replay_ratio": 0.5, "replay_buffer_size": 8},
            "replay_ratio=0.5 draws positions that verification exposed.*Set replay_ratio to 0, or anchors to",
        ),
        (
            {"dpace_alpha": 0.5, "sft_decay": 0.9},
            "sft_decay=0.9 and dpace_alpha=0.5 both weigh.*Leave one of them out",
        ),
        ({"dpace_alpha": 0.5, "accepted_decay": 0.9}, "accepted_decay=0.9 and dpace_alpha=0.5 both weigh"),
        (
            {"dpace_alpha": 0.5, "accepted_loss": "accepted_length"},
            "accepted_loss='accepted_length' weighs slots as dpace_alpha=0.5 does.*Leave dpace_alpha out, or choose",
        ),
        ({"sample_proposals": True}, "sample_proposals=True needs temperature > 0"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True patches the models that Liger knows.*Leave it off"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "`accelerator_config` sets dispatch_batches, but the trainer lays its batches out itself. Leave it out",
        ),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers=0 starts none. Set dataloader_num_workers"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message) as raised:
        DraftOPDConfig("out", report_to=[], **settings)
    assert "\n" not in str(raised.value)


def test_an_unused_stream_may_keep_any_loss():
    config = DraftOPDConfig("out", report_to=[], rejected_loss="k3", rejected_weight=0.0)
    assert config.rejected_loss == "k3" and config.losses.rejected.kind == "ce"


def test_a_servers_password_is_not_shown():
    with pytest.raises(ValueError, match=r"server_url='http://\*\*\*@host' do not go together"):
        DraftOPDConfig("out", report_to=[], server_url="http://me:secret@host")
