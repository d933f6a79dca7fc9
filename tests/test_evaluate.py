"""The paper's tasks by one command: through the harness, on tasks of our own, without a network."""

import json

import pytest
import torch
import transformers
from test_generate import call, refused
from test_model import TINY

pytest.importorskip("lm_eval", reason="pip install -e '.[eval]'")
TASKS = {"choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"},
         "text": {"output_type": "generate_until",
                  "generation_kwargs": {"until": [".", "!"], "max_gen_toks": 30}},
         "whole": {"output_type": "loglikelihood_rolling", "doc_to_text": "",
                   "doc_to_target": "{{choices[0]}}", "metric_list": [{"metric": "bits_per_byte"}]}}

@pytest.fixture
def rows(tmp_path):
    """Beginnings of stories, and two ways to go on: the story's own, and another one's."""
    words = (TINY / "held-out.txt").read_text().split(" ")
    part = lambda start, count: " ".join(words[start:start + count])
    rows = [{"text": part(i, 70), "choices": [part(i + 70, 6), part(i + 370, 6)]}
            for i in range(0, 600, 200)]
    (tmp_path / "rows").write_text("\n".join(map(json.dumps, rows)))
    data = {"data_files": {"test": f"{tmp_path}/rows"}, "cache_dir": f"{tmp_path}"}
    for name, kind in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({  # which is YAML
            "task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test",
            "doc_to_text": "{{text}}", "doc_to_target": 0, **kind}))
    return rows

def run(folder, options):
    """Accuracy, log-likelihoods of the choices (rows, 2), answers, and log-likelihoods of texts."""
    code, _, error = call(f"bench/evaluate.py --tasks {','.join(TASKS)} --include-path "
                          f"{folder} --json {folder}/out {options}")
    assert code == 0, error
    figures = json.loads((folder / "out").read_text())
    choices, said, whole = (sum((row["filtered_resps"] for row in figures["samples"][name]), [])
                            for name in TASKS)
    return (figures["results"]["choice"]["acc,none"], torch.tensor(choices)[:, 0].view(-1, 2), said,
            torch.tensor(whole))

def test_dense_results_are_those_of_transformers_and_sparse_ones_are_near(rows, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    encode = lambda *texts: tokenizer(" ".join(texts), return_tensors="pt").input_ids  # (1, T)
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    expected, said, texts = [], [], []

    def score(ids, T):  # of all but the first T
        log_p = model(ids).logits.detach().log_softmax(-1)[0, T - 1:-1]
        return log_p.gather(-1, ids[0, T:, None]).sum()

    for prompt, choices in (row.values() for row in rows):
        T = encode(prompt).shape[1]
        texts.append(score(encode(choices[0]), 1))
        expected += [score(encode(prompt, choice), T) for choice in choices]
        new = model.generate(encode(prompt), max_new_tokens=30, do_sample=False)[0, T:]
        said.append(tokenizer.decode(new, skip_special_tokens=True).replace("!", ".").split(".")[0])
    accuracy, dense, answers, whole = run(tmp_path, "--dense")
    torch.testing.assert_close(dense.flatten(), torch.stack(expected), rtol=0, atol=1e-3)
    torch.testing.assert_close(whole, torch.stack(texts), rtol=0, atol=1e-3)
    assert accuracy == (dense[:, 0] > dense[:, 1]).float().mean() and answers == said
    apart = (run(tmp_path, "--buffer 4 --window 1 --sparsity 8 --coding fp8")[1] - dense).abs()
    assert apart.min() > 1e-3 and apart.mean() < 0.1 * dense.abs().mean()  # it was used, and serves

def test_more_tokens_than_the_context_holds_are_refused_in_one_line(rows, tmp_path):
    refused(f"bench/evaluate.py --tasks text --include-path {tmp_path} --limit 1 "
            "--max-new-tokens 9999", "9999 tokens after a prompt")
