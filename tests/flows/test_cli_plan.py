"""`varflow plan` without any server, `varflow preflight` and a measured plan on a real stack."""

import json
import shutil
from pathlib import Path

import pytest

from flows.plan import DEMO, find_mfu
from infra.settings import Settings
from infra.store import open_store
from tests.faults.command import Command, small
from tests.flows.test_cli_stack import varflow
from tests.tasks.maker import BASE, Maker
from training.config import Precision
from training.devices import PRICES_AS_OF
from training.plan import Mfu

ASSUMED = ("--rows", "100", "--tokens", "64")


def test_a_plan_needs_neither_servers_nor_weights(tmp_path: Path) -> None:
    done = varflow("plan", "smoke", "--json", *ASSUMED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["parameters"], plan["rows"], plan["tokens"], plan["fits"]) == (43_168, 100, 6200, True)
    assert plan["data_basis"].startswith("given: a prompt of 32 tokens and 2 responses of 16")
    assert plan["usd"] is None and plan["hours"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_any_size_is_planned_and_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    words = (
        "plan",
        "hh_rlhf",
        "--set",
        "policy=architecture:llama-3.1-70b",
        "--set",
        "train.precision=bfloat16",
        "--device",
        "H100",
    )
    done = varflow(*words, "--ranks", "8", cwd=tmp_path)
    assert done.returncode == 1
    assert "70,553,706,496 parameters, 80 layers" in done.stdout
    # 70,553,706,496 / 8 numbers a rank: 4 bytes each, moments 8; 10 for each of a layer's 855,654,400, and 4 for the 2 x 128,256 x 8,192 + 8,192
    # around the layers; activations of 2 x (256 + 2 x 127) tokens, 446,464 bytes in each layer; 12 for each logit of 2 x 256 tokens, and 8 for
    # each number of the head. 2.12e18 operations at 0.4 x 989e12 a second are 1.488 hours of one device, 2.99 USD each.
    for line in (
        "data    10,000 rows of 510 tokens (assumed: a prompt of 256 tokens and 2 responses of 128)",
        "run     625 steps, 5,100,000 tokens, 2.12e+18 operations",
        "memory  189.80 GiB  together on each rank, of 79.00 GiB: DOES NOT FIT",
        "         32.85 GiB  weights",
        "         32.85 GiB  gradients",
        "         65.71 GiB  AdamW's moments",
        "         15.80 GiB  weights and gradients that are whole: around the layers, of the one under way",
        "         34.02 GiB  activations of a micro-batch of 1,020 tokens",
        "          8.56 GiB  a chunk of logits, the head's gradient",
        "        262.83 GiB  of the first machine's memory when the model is written",  # 4 bytes a parameter
        "time    11 min on 8 x H100 at 989 TFLOP/s (bfloat16 peak of the data sheet, 40.00% of it, assumed)",
        f"cost    4.45 USD (2.99 USD an hour and device, assumed as of {PRICES_AS_OF})",
    ):
        assert line in done.stdout.splitlines()
    assert done.stderr.startswith("varflow: memory: llama of 70.6 B parameters") and done.stderr.count("\n") == 1
    fits = varflow(*words, "--ranks", "64", "--mfu", "0.35", "--json", cwd=tmp_path)
    assert fits.returncode == 0, fits.stderr
    found = json.loads(fits.stdout)
    assert found["fits"] is True and (found["parts"], found["busy_share"]) == (16, 0.25)
    told = varflow(*words, "--ranks", "64", cwd=tmp_path).stdout
    assert "a step has 16 parts for 64 ranks, which work 25% of the time: raise train.batch_prompts" in told
    assert "\ncost    17.80 USD" in told  # and cost four times as much


def test_a_config_file_alone_is_enough(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(config))
    done = varflow("plan", "smoke", "--set", f"policy={file}", "--json", *ASSUMED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model_type"] == "qwen2"


@pytest.mark.parametrize("policy", ["hub:org/name@" + 40 * "0", "architecture:gpt-9", "embedded:none"])
def test_a_policy_whose_config_is_not_here_is_refused_and_no_hub_is_asked(policy: str, tmp_path: Path) -> None:
    done = varflow("plan", "smoke", "--set", f"policy={policy}", *ASSUMED, cwd=tmp_path)
    assert done.returncode == 1
    assert "its config is not on this machine, and a plan asks no hub" in done.stderr


def test_preflight_alone_then_a_plan_measured_on_its_rows(stack: Settings, tmp_path: Path) -> None:
    command = Command(stack, tmp_path)
    found = command.ask("preflight", "smoke", *small())
    assert found["passed"] is True
    assert [step["step"] for step in found["steps"]] == ["ingest", "score_rewards", "score_reference"]
    assert {check["outcome"] for check in found["checks"]} == {"passed"}
    assert not list((stack.home / "work" / "preflight").glob("*/"))

    plan = command.ask("plan", "smoke", *small())
    assert "rows of the ingest artifact, by the policy's tokenizer" in plan["data_basis"]
    assert 0 < plan["rows"] <= 32

    done = command.run("preflight", "smoke", *small(), "--set", "policy=" + str(broken(tmp_path)))
    assert done.returncode == 1, done.stderr
    assert "failed  stop_tokens: " in done.stdout and "training would stop here" in done.stdout


def test_a_measured_mfu_is_of_the_same_precision_and_a_share(s3: Settings, tmp_path: Path) -> None:
    store = open_store(s3)
    maker = Maker(store, tmp_path)

    def record(precision: str, share: float, day: int) -> str:
        summary = {"device": "B200", "parameters": 4321, "flop_share": share}
        made = maker.make(
            "train", {"base": BASE}, {"config.json": "{}"}, config={"precision": precision, "seed": day}, summary=summary,
            created=f"2026-01-0{day}T00:00:00+00:00",
        )  # fmt: skip
        return f"measured in train/{made.fingerprint[:12]}"

    narrow, wide = record("bfloat16", 0.4, 1), record("float32", 0.7, 2)
    record("bfloat16", 1.3, 3)  # of a rate that was measured while something else ran
    assert find_mfu("B200", 4321, precision=Precision.bfloat16, store=store) == Mfu(0.4, narrow)
    assert find_mfu("B200", 4321, precision=Precision.float32, store=store) == Mfu(0.7, wide)
    assert find_mfu("B200", 4322, precision=Precision.float32, store=store) is None


def broken(folder: Path) -> Path:
    """Return a copy of the small policy whose turns end with a token at which nobody stops."""
    copy = shutil.copytree(DEMO / "tiny-policy", folder / "policy")
    for name in ("config.json", "generation_config.json"):
        (copy / name).write_text((copy / name).read_text().replace('"eos_token_id": 1', '"eos_token_id": 2'))
    text = (copy / "tokenizer_config.json").read_text()
    (copy / "tokenizer_config.json").write_text(text.replace('"eos_token": "<|im_end|>"', '"eos_token": "<pad>"'))
    return copy
