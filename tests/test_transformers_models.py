"""Models of transformers whose loss is computed inside ``forward``: exact, eager and compiled, also by inductor."""

import shutil

import pytest
import torch
from exactness import PAGE, replaced
from oracle import Oracle
from transformers_models import COMPILED, MODELS

from pgt_hf import attach_powergrad

ALPHA = 0.25
LONG = {name: [pytest.mark.long] for name in ("T5ForConditionalGeneration", "BertForQuestionAnswering")}
COMPILED_BY_INDUCTOR = ("BertForSequenceClassification", "BertForQuestionAnswering", "T5ForConditionalGeneration")
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, None) for name in MODELS),
        *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in COMPILED),
        *(
            pytest.param(name, "inductor", marks=[needs_a_compiler, pytest.mark.slow, *LONG.get(name, ())])
            for name in COMPILED_BY_INDUCTOR
        ),
    ],
)
def test_a_model_that_computes_its_loss_receives_pgts_gradient(name, backend):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    output = model.train()(**inputs)
    with Oracle(ALPHA):
        output.loss.backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    handle = attach_powergrad(model, ALPHA)
    program = model if backend is None else torch.compile(model, backend=backend)
    loss = program(**inputs).loss
    loss.backward()
    optimizer.step()
    assert handle.calls == 1
    torch.testing.assert_close(loss, output.loss, rtol=0, atol=0 if backend is None else 1e-5)
    ours = gradients(model)
    assert ours.keys() == expected.keys()
    scale = max(grad.abs().max().item() for grad in expected.values())
    for key, wanted in expected.items():
        torch.testing.assert_close(
            ours[key], wanted, rtol=0, atol=(2e-6 if backend != "inductor" else 2e-5) * scale + 1e-7
        )


def test_the_table_of_what_is_exact_is_that_of_the_tests():
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page) == page, "run: python tests/exactness.py"
