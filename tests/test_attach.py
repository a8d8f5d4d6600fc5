"""One suite over many real models: what the backbone receives must be the gradient that the formula feeds by hand."""

import copy
import pickle
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from reference import powergrad_gradient
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from pgt_hf import PowerGradCrossEntropyLoss, PowerGradLogits, attach_powergrad, create_optimizer, fold_powergrad
from pgt_hf.heads import find_heads

ALPHA = 0.25
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def images(size=32):
    return torch.randn(4, 3, size, size), torch.randint(5, (4,))


def timm_model(name, size=32, **kwargs):
    return lambda: (timm.create_model(name, num_classes=5, **kwargs), images(size))


def deit():
    model, batch = timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2)()
    model.set_distilled_training(True)
    return model, batch


def vit():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config), images(16)


def timm_wrapper():
    config = transformers.TimmWrapperConfig(architecture="resnet18", num_labels=5)
    return transformers.TimmWrapperForImageClassification(config), images()


def bert():
    config = transformers.BertConfig(**SMALL, vocab_size=40, num_labels=5)
    return transformers.BertForSequenceClassification(config), (torch.randint(1, 40, (4, 7)), torch.randint(5, (4,)))


def bert_tokens():
    config = transformers.BertConfig(**SMALL, vocab_size=40, num_labels=5)
    labels = torch.randint(5, (4, 7)).masked_fill(torch.rand(4, 7) < 0.3, -100)
    return transformers.BertForTokenClassification(config), (torch.randint(1, 40, (4, 7)), labels)


def llama():
    config = transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)
    ids = torch.randint(1, 40, (4, 7))
    return transformers.LlamaForCausalLM(config), (ids, ids)


def gemma():
    config = transformers.Gemma2Config(**TEXT, final_logit_softcapping=3.0, attn_logit_softcapping=None)
    ids = torch.randint(1, 40, (4, 7))
    return transformers.Gemma2ForCausalLM(config), (ids, ids)


PLAIN = {
    "timm-resnet18": timm_model("resnet18"),
    "timm-seresnet18": timm_model("seresnet18"),
    "timm-vgg11_bn": timm_model("vgg11_bn", mlp_ratio=1 / 64),
    "timm-nf_resnet26": timm_model("nf_resnet26"),
    "timm-resnet18-norm-free": timm_model("resnet18", norm_layer=nn.Identity),
    "timm-vit": timm_model("vit_tiny_patch16_224", img_size=32, depth=2),
    "timm-deit-two-heads": deit,
    "torchvision-resnet18": lambda: (torchvision.models.resnet18(num_classes=5), images()),
    "torchvision-mobilenet": lambda: (torchvision.models.mobilenet_v3_small(num_classes=5), images()),
}
FOLDABLE = ["timm-resnet18", "timm-vit", "timm-vgg11_bn", "torchvision-resnet18", "torchvision-mobilenet"]
FOLDABLE += ["TimmWrapper", "ViT", "BERT"]
WITH_LOSS = {
    "TimmWrapper": timm_wrapper,
    "ViT": vit,
    "BERT": bert,
    "BERT-tokens": bert_tokens,
    "Llama-tied": llama,
    "Gemma2-softcap": gemma,
}


def prepare(factory, dtype=torch.float64):
    torch.manual_seed(0)
    model, (inputs, target) = factory()
    model = model.to(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, inputs.to(dtype) if inputs.is_floating_point() else inputs, target


def gradients(model):
    grads = [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    assert grads
    return grads


def assert_same(ours, theirs, atol=1e-10):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=atol, atol=atol)


def logits_loss(output, target):
    """The loss of a plain model: of two heads (deit in training), the sum of both."""
    return sum(F.cross_entropy(o, target) for o in (output if isinstance(output, tuple) else (output,)))


def by_hand(model, inputs, target, alpha=ALPHA):
    """Gradients from feeding (softmax(alpha z) - q) / N into the logits; and the true loss."""
    output = model(inputs)
    outputs = output if isinstance(output, tuple) else (output,)
    torch.autograd.backward(outputs, [powergrad_gradient(o, target, alpha).to(o.dtype) for o in outputs])
    return gradients(model), logits_loss(output, target).detach()


def by_hand_with_loss(model, inputs, target):
    output = model(inputs, labels=target)
    logits, aligned = output.logits, target
    if "CausalLM" in type(model).__name__:
        logits, aligned = logits[:, :-1], target[:, 1:]
    logits.backward(powergrad_gradient(logits, aligned, ALPHA).to(logits.dtype))
    return gradients(model), output.loss.detach()


@pytest.mark.parametrize("name", PLAIN)
def test_plain_models_receive_the_formulas_gradient(name):
    model, inputs, target = prepare(PLAIN[name])
    rng = torch.get_rng_state()
    expected, true_loss = by_hand(model, inputs, target)
    torch.set_rng_state(rng)
    with attach_powergrad(model, alpha=ALPHA) as handle:
        loss = logits_loss(model(inputs), target)
        loss.backward()
    assert handle.calls == 1
    torch.testing.assert_close(loss, true_loss, rtol=0, atol=1e-12)
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_models_that_compute_their_loss_receive_the_formulas_gradient(name):
    model, inputs, target = prepare(WITH_LOSS[name])
    expected, true_loss = by_hand_with_loss(model, inputs, target)
    with attach_powergrad(model, alpha=ALPHA) as handle:
        loss = model(inputs, labels=target).loss
        loss.backward()
    assert handle.calls == 1
    in_float32 = "CausalLM" in type(model).__name__  # transformers casts these logits to float32
    torch.testing.assert_close(loss, true_loss, rtol=1e-6 if in_float32 else 1e-12, atol=0)
    assert_same(gradients(model), expected, atol=1e-6 if in_float32 else 1e-10)


def test_ctc_takes_the_powered_softmax_for_the_softmax():
    config = transformers.Wav2Vec2Config(
        **SMALL, vocab_size=8, conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0, attention_dropout=0.0, pad_token_id=0,
        ctc_loss_reduction="mean",
    )  # fmt: skip
    model, inputs, labels = prepare(
        lambda: (transformers.Wav2Vec2ForCTC(config), (torch.randn(2, 400), torch.randint(1, 8, (2, 4))))
    )
    # d(sum of the CTC losses)/dz = softmax(z) - q; so q comes from torch, and the expectation is the formula.
    logits = model(inputs).logits.detach().float().requires_grad_()
    lengths = torch.full((2,), logits.size(1))
    log_probs = F.log_softmax(logits, -1).transpose(0, 1)
    F.ctc_loss(log_probs, labels.flatten(), lengths, torch.tensor([4, 4]), reduction="sum").backward()
    q = logits.detach().softmax(-1) - logits.grad
    expected = (torch.softmax(ALPHA * logits.detach(), -1) - q) / 4 / 2  # mean over target lengths, then the batch
    assert (expected - logits.grad / 8).abs().max() > 1e-3
    seen = []
    with attach_powergrad(model, alpha=ALPHA, head="lm_head") as handle:
        hook = model.lm_head.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0]))
        loss = model(inputs, labels=labels).loss
        loss.backward()
        hook.remove()
    torch.testing.assert_close(loss, model(inputs, labels=labels).loss, rtol=1e-6, atol=0)
    assert handle.calls == 1
    torch.testing.assert_close(seen[0].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["timm-resnet18", "TimmWrapper"])
def test_alpha_one_is_plain_training_bit_for_bit(name):
    model, inputs, target = prepare((PLAIN | WITH_LOSS)[name], torch.float32)
    state = copy.deepcopy(model.state_dict())

    def run():
        model.load_state_dict(state)
        output = model(inputs, labels=target).loss if name == "TimmWrapper" else F.cross_entropy(model(inputs), target)
        output.backward()
        return gradients(model)

    plain = run()
    with attach_powergrad(model, alpha=1):
        assert all(torch.equal(a, b) for a, b in zip(run(), plain, strict=True))


def test_label_smoothing_soft_targets_and_other_ways_to_write_the_loss_are_exact():
    model, inputs, target = prepare(PLAIN["timm-resnet18"])
    soft = torch.rand(4, 5, dtype=torch.float64).softmax(-1)
    losses = {
        "smoothed": (lambda z: nn.CrossEntropyLoss(label_smoothing=0.1)(z, target), (target, 0.1)),
        "soft": (lambda z: F.cross_entropy(z, soft), (soft, 0.0)),
        "timm soft": (lambda z: SoftTargetCrossEntropy()(z, soft), (soft, 0.0)),
        "timm smoothed": (lambda z: LabelSmoothingCrossEntropy(0.1)(z, target), (target, 0.1)),
        "nll": (lambda z: F.nll_loss(z.log_softmax(dim=1), target), (target, 0.0)),
        "kl": (lambda z: F.kl_div(torch.log_softmax(z, 1), soft, reduction="batchmean"), (soft, 0.0)),
        "legacy": (lambda z: F.cross_entropy(z, target, None, False) / 4, (target, 0.0)),
    }
    for _, (loss, (q, smoothing)) in losses.items():
        z = model(inputs)
        z.backward(powergrad_gradient(z, q, ALPHA, smoothing))
        expected = gradients(model)
        with attach_powergrad(model, alpha=ALPHA):
            loss(model(inputs)).backward()
        assert_same(gradients(model), expected)


@pytest.mark.slow
def test_autocast_gives_the_formulas_gradient_of_the_logits_it_made():
    model, inputs, target = prepare(PLAIN["timm-resnet18"], torch.float32)
    seen = []
    with attach_powergrad(model, alpha=ALPHA), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs)
        logits.register_hook(seen.append)
        F.cross_entropy(logits, target).backward()
    expected = powergrad_gradient(logits.float().detach(), target, ALPHA)
    torch.testing.assert_close(seen[0].double(), expected, rtol=2**-8, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    model, inputs, target = prepare(vit)
    with attach_powergrad(model, alpha=ALPHA):
        model(inputs, labels=target).loss.backward()
        expected = gradients(model)
        model.gradient_checkpointing_enable()
        model(inputs, labels=target).loss.backward()
    assert_same(gradients(model), expected)


def test_two_halves_accumulated_are_the_whole_batch():
    model, inputs, target = prepare(PLAIN["timm-vit"])
    inputs, target = torch.randn(16, 3, 32, 32, dtype=torch.float64), torch.randint(5, (16,))
    with attach_powergrad(model, alpha=ALPHA):
        F.cross_entropy(model(inputs), target).backward()
        whole = gradients(model)
        for half in (slice(8), slice(8, None)):
            (F.cross_entropy(model(inputs[half]), target[half]) / 2).backward()
    assert_same(gradients(model), whole)


@pytest.mark.slow
@pytest.mark.parametrize("compile_loss", [False, True])
def test_one_compilation_serves_every_alpha(compile_loss):
    model, inputs, target = prepare(PLAIN["timm-resnet18-norm-free"], torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    handle = attach_powergrad(model, alpha=0.9)
    step = torch.compile(
        (lambda: F.cross_entropy(model(inputs), target)) if compile_loss else model, backend=backend, fullgraph=True
    )
    compiled = []
    for alpha in (0.9, 0.5, ALPHA):
        handle.alpha = alpha
        (step() if compile_loss else F.cross_entropy(step(inputs), target)).backward()
        ours = gradients(model)
        compiled.append(len(graphs))
    assert len(set(compiled)) == 1 and handle.calls == 3
    handle.remove()
    assert_same(ours, by_hand(model, inputs, target)[0], atol=1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_gradients():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    inputs, target = torch.randn(4, 6), torch.arange(4)
    expected, _ = by_hand(model, inputs, target)
    with attach_powergrad(model, alpha=ALPHA):
        torch.compile(lambda x, y: F.cross_entropy(model(x), y), fullgraph=True)(inputs, target).backward()
    assert_same(gradients(model), expected, atol=1e-6)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_carries_the_transform_and_a_deep_copy_follows_the_handle(copier):
    model, inputs, target = prepare(lambda: (nn.Linear(6, 5), (torch.randn(4, 6), torch.arange(4))))
    expected, _ = by_hand(model, inputs, target)
    plain = copy.deepcopy(model)
    handle = attach_powergrad(model, alpha=ALPHA)
    twin = copier(model)
    F.cross_entropy(twin(inputs), target).backward()
    assert_same(gradients(twin), expected)
    handle.alpha = 0.9
    twin.zero_grad()
    F.cross_entropy(twin(inputs), target).backward()
    ours = gradients(twin)
    assert_same(ours, by_hand(plain, inputs, target, 0.9)[0] if copier is copy.deepcopy else expected)


def test_ema_of_a_model_stays_plain():
    model, inputs, _ = prepare(PLAIN["timm-resnet18"])
    with attach_powergrad(model, alpha=ALPHA):
        ema = timm.utils.ModelEmaV3(model)
        ema.update(model)
        assert type(ema.module(inputs)) is torch.Tensor


@pytest.mark.parametrize("kind", ["transformers", "plain"])
def test_peft_lora_receives_the_formulas_gradient(kind):
    peft = pytest.importorskip("peft")

    def factory():
        model, batch = vit() if kind == "transformers" else PLAIN["timm-vit"]()
        targets, head = (["q_proj", "v_proj"], "classifier") if kind == "transformers" else (["qkv"], "head")
        names = [name.split(".")[-1] for name, _ in model.named_modules()]
        targets = targets if targets[0] in names else ["query", "value"]
        return peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[head], init_lora_weights=False)
        ), batch

    model, inputs, target = prepare(factory)
    output = model(inputs)
    logits = output.logits if kind == "transformers" else output
    logits.backward(powergrad_gradient(logits, target, ALPHA))
    expected = gradients(model)
    with attach_powergrad(model, alpha=ALPHA) as handle:
        output = model(inputs)
        F.cross_entropy(output.logits if kind == "transformers" else output, target).backward()
    assert handle.calls == 1
    assert_same(gradients(model), expected)


def test_it_acts_only_in_training_mode_with_gradients():
    model, inputs, _ = prepare(PLAIN["timm-resnet18"])
    with attach_powergrad(model, alpha=ALPHA):
        assert isinstance(model(inputs), PowerGradLogits)
        with torch.no_grad():
            assert type(model(inputs)) is torch.Tensor
        assert type(model.eval()(inputs)) is torch.Tensor
    assert type(model.train()(inputs)) is torch.Tensor


def test_attaching_twice_is_an_error_that_says_so():
    model = nn.Linear(3, 2)
    handle = attach_powergrad(model, alpha=ALPHA)
    with pytest.raises(RuntimeError, match="already attached to this Linear"):
        attach_powergrad(model, alpha=ALPHA)
    handle.remove()
    attach_powergrad(model, alpha=ALPHA).remove()


def test_a_loss_that_never_uses_the_transform_is_an_error_that_names_what_it_met():
    model = nn.Linear(3, 2)
    attach_powergrad(model, alpha=ALPHA)
    with pytest.raises(RuntimeError, match=r"binary_cross_entropy_with_logits.*training without PGT"):
        F.binary_cross_entropy_with_logits(model(torch.randn(4, 3)), torch.rand(4, 2)).backward()


def test_a_fused_loss_that_passes_the_head_by_is_an_error():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            return F.cross_entropy(F.linear(self.body(x), self.head.weight), y)

    model = Fused()
    attach_powergrad(model, alpha=ALPHA, head="head")
    with pytest.raises(RuntimeError, match="training without PGT"):
        model(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])).backward()


def test_a_head_that_is_not_found_lists_its_candidates():
    config = transformers.ViTConfig(**SMALL, image_size=16, patch_size=8)
    with pytest.raises(ValueError, match=r"no classification head on ViTModel.*head=.*query|q_proj"):
        attach_powergrad(transformers.ViTModel(config), alpha=ALPHA)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="names no module.*'0', '1'"):
        attach_powergrad(model, alpha=ALPHA, head="fc")
    with pytest.raises(ValueError, match="not part of the model"):
        attach_powergrad(model, alpha=ALPHA, head=nn.Linear(3, 2))
    with pytest.raises(TypeError, match="head must be"):
        attach_powergrad(model, alpha=ALPHA, head=3)
    assert find_heads(model, "1") == [model[1]] and find_heads(model, [model[0], "1"]) == [model[0], model[1]]


@pytest.mark.parametrize("alpha", [float("nan"), -1, True, "0.3"])
def test_a_bad_alpha_is_refused_when_attached_and_when_moved(alpha):
    model = nn.Linear(3, 2)
    with pytest.raises((TypeError, ValueError), match="alpha"):
        attach_powergrad(model, alpha=alpha)
    handle = attach_powergrad(model, alpha=ALPHA)
    with pytest.raises((TypeError, ValueError), match="alpha"):
        handle.alpha = alpha
    assert handle.alpha == ALPHA


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_scales_the_logits_by_alpha_exactly(name):
    model, inputs, _ = prepare((PLAIN | WITH_LOSS)[name])
    model.eval()
    logits = getattr(model(inputs), "logits", model(inputs))
    folded = fold_powergrad(model, 0.25)(inputs)
    torch.testing.assert_close(getattr(folded, "logits", folded), 0.25 * logits, rtol=0, atol=1e-12)


def test_folding_where_it_would_be_wrong_is_an_error():
    with pytest.raises(ValueError, match="shares its weight with the input embeddings"):
        fold_powergrad(llama()[0], 0.25)
    with pytest.raises(ValueError, match="caps its logits"):
        fold_powergrad(gemma()[0], 0.25)
    with pytest.raises(ValueError, match="above 0"):
        fold_powergrad(nn.Linear(3, 2), 0)
    with pytest.raises(ValueError, match="must have a linear layer at its head"):
        fold_powergrad(nn.ReLU(), 0.25)


def test_a_whole_run_is_the_reparameterised_cross_entropy_run():
    """Method card, 'Equivalence': 200 Nesterov steps with weight decay, float64."""
    alpha, lr, decay = 0.25, 0.05, 1e-3
    generator = torch.Generator().manual_seed(1)
    xs = torch.randn(200, 16, 6, dtype=torch.float64, generator=generator)
    ys = torch.randint(4, (200, 16), generator=generator)

    class ScaleGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad / alpha

    def network():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh()).double(), nn.Linear(12, 4).double()

    body, head = network()
    model = nn.Sequential(body, head)
    optimizer = create_optimizer(
        model, "powergrad_sgd", lr=lr, alpha=alpha, momentum=0.9, nesterov=True, weight_decay=decay,
        filter_bias_and_bn=False,
    )  # fmt: skip
    criterion = nn.CrossEntropyLoss()
    for x, y in zip(xs, ys, strict=True):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    body2, head2 = network()
    fold_powergrad(head2, alpha)
    groups = [
        {"params": body2.parameters(), "lr": lr, "weight_decay": decay},
        {"params": head2.parameters(), "lr": lr * alpha, "weight_decay": decay / alpha},
    ]
    plain = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for x, y in zip(xs, ys, strict=True):
        plain.zero_grad()
        F.cross_entropy(head2(ScaleGradient.apply(body2(x))), y).backward()
        plain.step()
    for ours, theirs in zip(body.parameters(), body2.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha * head.weight, head2.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(alpha * head.bias, head2.bias, rtol=0, atol=1e-12)


def test_the_loss_module_needs_no_attachment():
    model, inputs, target = prepare(PLAIN["timm-resnet18"])
    expected, _ = by_hand(model, inputs, target)
    PowerGradCrossEntropyLoss(ALPHA)(model(inputs), target).backward()
    assert_same(gradients(model), expected)
