"""lm-evaluation-harness itself, as ``local-completions``, on two small local tasks. Slow.

It is installed apart (``uv tool install 'lm-eval[api]'``), since it brings a hundred packages, and found as a command.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaForCausalLM

from server.launch import ASSETS, load_model
from server.text import TextCodec

pytestmark = pytest.mark.slow
COMMAND = shutil.which("lm_eval") or ""
START_S = 120.0
DOCS = [
    {"question": "def add(a, b):\n    return a", "choices": ["+ b", "- b", "(b)"], "answer": 0},
    {"question": "The sum of 2 and 3 is", "choices": ["5.", "seven", "not known to anyone in this room"], "answer": 0},
    {"question": "import os\n\n\nprint(os.path", "choices": [".join(a, b))", "🌍)", "= 3"], "answer": 0},
]
BOTH = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
doc_to_text: "{{question}}"
metadata: {version: 1}
"""
CHOOSING = """
task: choosing
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
GOING_ON = """
task: going_on
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 24, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def run(url: str, folder: Path) -> dict[str, list[dict]]:
    """The samples of both tasks, as the harness logs them."""
    file = folder / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS), encoding="utf-8")
    for name, task in (("choosing", CHOOSING), ("going_on", GOING_ON)):
        (folder / f"{name}.yaml").write_text((task + BOTH).replace("FILE", os.fspath(file)), encoding="utf-8")
    model = f"model=tiny,base_url={url}/v1/completions,tokenizer_backend=remote,max_length=256,num_concurrent=1"
    command = [COMMAND, "--model", "local-completions", "--model_args", model, "--tasks", "choosing,going_on",
               "--include_path", folder, "--output_path", folder / "out", "--log_samples"]  # fmt: skip
    surroundings = dict(os.environ) | {"HF_HOME": os.fspath(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    del surroundings["PYTHONPATH"]  # of this environment, which the harness does not share
    made = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
    found = {}
    for name in ("choosing", "going_on"):
        (log,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        found[name] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return found


def test_the_harness_scores_as_transformers_and_generates(listen, tmp_path, monkeypatch):
    if not COMMAND:
        pytest.skip("lm_eval is not on the path: uv tool install 'lm-eval[api]'")
    monkeypatch.setenv("PYTHONPATH", "")
    codec = TextCodec.from_folder(ASSETS / "target")
    reference = LlamaForCausalLM.from_pretrained(ASSETS / "target", dtype=torch.float32).eval()
    with listen(load_model, target="tiny", weights="fp32", context=256, max_waiting=16) as (url, _):
        deadline = time.monotonic() + START_S
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        samples = run(url, tmp_path)
    compared = 0
    for sample in samples["choosing"]:
        asked = [(each["arg_0"], each["arg_1"]) for each in sample["arguments"].values()]
        for (context, continuation), ((told, is_greedy),) in zip(asked, sample["resps"], strict=True):
            ids = codec.encode(context + continuation, add_special_tokens=False)
            start = len(codec.encode(context, add_special_tokens=False))
            with torch.inference_mode():
                rows = reference(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
            own = rows.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()
            assert float(told) == pytest.approx(own, abs=1e-3)
            assert (is_greedy in (True, "True")) == (rows.argmax(-1).tolist() == ids[start:])
            compared += 1
    assert compared == 9
    for sample in samples["going_on"]:
        ids = torch.tensor([codec.encode(sample["arguments"]["gen_args_0"]["arg_0"], add_special_tokens=False)])
        with torch.inference_mode():
            whole = reference.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert sample["resps"] == [[codec.decode(whole.tolist()).split("\n\n")[0]]]
