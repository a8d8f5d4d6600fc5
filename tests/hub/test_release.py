"""Push, load back and fail, against the Hub of hub_server.py over a socket; the client is another interpreter."""

import re
import socket

import pytest
from hub_client import READER, STRANGER, TOKEN
from huggingface_hub import ModelCard
from launch import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(client, tmp_path_factory):
    """A run that was never pushed: trained for four steps, with a card's worth of records."""
    folder = tmp_path_factory.mktemp("runs") / "ants"
    client.run(f"""
        from pgt_hf.analysis import plot_training_curve
        t = trainer({str(folder)!r}, save_total_limit=None)
        t.train()
        t.save_model()
        arguments = {{"alpha": 0.25, "hub_token": {TOKEN!r}, "optim": "powergrad_sgd", "output_dir": {str(folder)!r}}}
        run = {{"dataset_name": "digits", "arguments": arguments, "host": "canaryhost", "user": "canaryuser",
               "packages": {{"torch": torch.__version__}}}}
        Path({str(folder)!r}, "run.json").write_text(json.dumps(run))
        metrics = {{"top1": 0.5, "top5": 1.0, "nll": 1.5, "nll_folded": 1.25, "ece": 0.1, "ece_folded": 0.3,
                   "eval_images": 360}}
        Path({str(folder)!r}, "metrics.json").write_text(json.dumps(metrics))
        plot_training_curve(t.state.log_history, {str(folder / "training_curve.png")!r})
    """)
    return folder


@pytest.fixture(scope="module")
def pushed(server, client, run):
    client.run(f"print(push_run({str(run)!r}, 'ants', token={TOKEN!r}, private=True).commit_url)")
    return server.files("alice/ants")


def test_one_repository_serves_timm_transformers_and_pipelines_bit_for_bit(client, run, pushed):
    client.run(f"""
        os.environ["HF_TOKEN"] = {TOKEN!r}
        import timm
        from PIL import Image
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
        from safetensors.torch import load_file
        fresh = create_model("resnet10t", NAMES, image_size=32)
        fresh.load_state_dict(load_file(Path({str(run)!r}, "model.safetensors")))
        expected = logits(fresh)
        theirs = AutoModelForImageClassification.from_pretrained("alice/ants")
        assert torch.equal(logits(theirs), expected)
        assert theirs.config.id2label == dict(enumerate(NAMES))
        assert theirs.config.powergrad_alpha == 0.25 and theirs.config.powergrad_folded is False
        network = timm.create_model("hf-hub:alice/ants", pretrained=True)
        assert torch.equal(logits(network), expected)
        assert network.pretrained_cfg["label_names"] == NAMES
        data = timm.data.resolve_model_data_config(network)
        assert list(data["input_size"]) == [3, 32, 32] and list(data["mean"]) == [0.485, 0.456, 0.406]
        assert list(data["std"]) == [0.229, 0.224, 0.225]
        image = Image.new("RGB", (32, 32), "red")
        transform = timm.data.create_transform(**data, is_training=False)
        processor = AutoImageProcessor.from_pretrained("alice/ants")
        assert torch.equal(processor(image)["pixel_values"][0], transform(image))
        best = pipeline("image-classification", "alice/ants")(image)[0]
        assert best["label"] == NAMES[theirs(processor(image)["pixel_values"]).logits.argmax()]
        del os.environ["HF_TOKEN"]
    """)


def test_repository_holds_safetensors_card_and_pictures_and_nothing_that_unpickles(pushed):
    files = {"README.md", "config.json", "model.safetensors", "training_curve.png", "report.html"}
    assert set(pushed) == files


def test_weights_went_by_lfs_where_xet_is_switched_off(server, pushed):
    assert any(request.startswith("PUT /lfs/") for request in server.requests)
    assert not any("xet" in request for request in server.requests)


def test_no_token_host_user_or_local_path_is_among_the_pushed_bytes(pushed, run):
    canaries = [TOKEN, "canaryhost", "canaryuser", str(run), str(run.parent), str(ROOT), "/home/canary"]
    for name, content in pushed.items():
        found = [canary for canary in canaries if canary.encode() in content]
        assert not found, f"{name} holds {found}"
    host = rf"\b{re.escape(socket.gethostname())}\b".encode()  # may be too short to look for in weights
    assert not [name for name in ("README.md", "config.json", "report.html") if re.search(host, pushed[name])]


def test_code_in_the_card_runs_as_it_stands(client, pushed, tmp_path):
    from PIL import Image

    Image.new("RGB", (40, 32), "green").save(tmp_path / "image.jpg")
    blocks = re.findall(r"^```python\n(.*?)^```$", pushed["README.md"].decode(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    client.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}; os.chdir({str(tmp_path)!r})")
    printed = [client.run(block, common="") for block in blocks]
    client.run("del os.environ['HF_TOKEN']")
    names = ["ant", "bee", "cat", "dog"]
    assert [text.strip() in names for text in printed[1:]] == [True, True]
    assert printed[1] == printed[2]
    assert f"'label': '{printed[1].strip()}'" in printed[0]


def test_card_says_what_was_run_in_the_hubs_own_terms(pushed):
    card = ModelCard(pushed["README.md"].decode())
    results = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results >= {("accuracy", 0.5), ("top_5_accuracy", 1.0), ("ece", 0.3), ("ece", 0.1), ("nll", 1.25)}
    assert card.data.eval_results[0].dataset_type == "digits"
    assert card.data.library_name == "timm" and card.data.pipeline_tag == "image-classification"
    says = ["alpha = 0.25", "| optim | powergrad_sgd |", "CC BY 4.0", "![Training curve](training_curve.png)", "360"]
    says += ["1.5 for `softmax(z)` and 1.25 for `softmax(0.25 * z)`: take `softmax(0.25 * z)`"]  # whatever the ECE
    says += ["@article{das2021altering"]
    assert not [text for text in says if text not in card.text]


def test_local_hub_looks_at_the_cards_metadata(client):
    bad = "---\nmodel-index:\n- name: x\n  results:\n  - task: {type: t}\n    metrics: [{type: accuracy}]\n---\n"
    _, error = client.attempt(f"""
        Path("bad").mkdir()
        Path("bad", "README.md").write_text({bad!r})
        push_release("bad", "alice/bad", token={TOKEN!r})
    """)
    assert "Invalid metadata in README.md" in error and "needs name and type" in error


def test_folded_weights_give_the_trained_probabilities(server, client, run):
    client.run(f"push_run({str(run)!r}, 'alice/folded', token={TOKEN!r}, fold=True)")
    client.run(f"""
        from transformers import AutoModelForImageClassification as Auto
        folded = Auto.from_pretrained("alice/folded")
        assert folded.config.powergrad_folded and folded.config.powergrad_alpha == 0.25
        torch.testing.assert_close(logits(folded), 0.25 * logits(load({str(run)!r})), rtol=1e-6, atol=1e-6)
    """)
    card = ModelCard(server.files("alice/folded")["README.md"].decode())
    assert "has been multiplied into the head" in card.text and "take `softmax(" not in card.text
    results = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {("accuracy", 0.5), ("top_5_accuracy", 1.0), ("nll", 1.25), ("ece", 0.3)}


def test_moving_average_is_what_is_pushed_where_there_is_one(client, run, tmp_path):
    client.run(f"""
        shutil.copytree({str(run)!r}, {str(tmp_path / "run")!r})
        average = create_model("resnet10t", NAMES, image_size=32)
        average.save_pretrained({str(tmp_path / "run" / "ema")!r})
        from transformers import AutoModelForImageClassification as Auto
        for ema, expected in ((True, average), (False, load({str(run)!r}))):
            push_run({str(tmp_path / "run")!r}, 'alice/averaged', token={TOKEN!r}, ema=ema)
            there = Auto.from_pretrained("alice/averaged", force_download=True)
            assert torch.allclose(logits(there), logits(expected), rtol=1e-6, atol=1e-6)
    """)


@pytest.mark.parametrize("variant", ["norm_free", "small_images"])
def test_variants_of_this_package_load_after_the_import_that_their_card_names(server, client, variant, tmp_path):
    client.run(f"""
        import timm
        model = create_model("resnet18", NAMES, image_size=32, {variant}=True)
        model.save_pretrained({str(tmp_path)!r})
        push_run({str(tmp_path)!r}, "alice/{variant}", token={TOKEN!r})
        there = timm.create_model("hf-hub:alice/{variant}", pretrained=True)
        assert torch.equal(logits(there), logits(model))
        assert torch.equal(logits(load("alice/{variant}")), logits(model))
    """)
    card = server.files(f"alice/{variant}")["README.md"].decode()
    assert card.count("import pgt_hf.models") == card.count("```python")


def test_private_repository_is_seen_by_its_owner_alone(server, client, pushed):
    assert server.repos["alice/ants"]["private"] is True
    printed = client.run(f"""
        from huggingface_hub import HfApi
        for token in ({TOKEN!r}, {READER!r}, {STRANGER!r}, False):
            try:
                print("sees", HfApi(token=token).model_info("alice/ants").private)
            except Exception as error:
                print(type(error).__name__)
    """)
    assert printed.split("\n")[:4] == ["sees True", "sees True", "RepositoryNotFoundError", "RepositoryNotFoundError"]


def test_push_to_a_branch_leaves_main_alone(server, client, run):
    client.run(f"push_run({str(run)!r}, 'alice/branches', token={TOKEN!r}, revision='try-1', message='A try')")
    assert server.titles("alice/branches", "try-1") == ["A try", "initial commit"]
    assert server.files("alice/branches", "main") == {}
    client.run("""
        import timm
        timm.create_model("hf-hub:alice/branches@try-1", pretrained=True)
        load("alice/branches", revision="try-1")
    """)


def test_second_push_of_the_same_run_makes_no_commit(server, client, run, pushed):
    before = server.titles("alice/ants")
    client.run(f"push_run({str(run)!r}, 'alice/ants', token={TOKEN!r})")
    assert server.titles("alice/ants") == before


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("hf_unknown_token", "alice/new", "is not valid"),
        (READER, "alice/new", r"may not write to 'alice/new' \(HTTP 403\)"),
        (READER, "alice/ants", r"may not write to 'alice/ants' \(HTTP 403\)"),
        (STRANGER, "alice/ants", "may not write to 'alice/ants'"),
        (STRANGER, "lab/new", "may not write to 'lab/new'"),
        (None, "alice/new", "no Hugging Face token was found"),
    ],
)
def test_access_that_is_missing_is_found_before_anything_is_done(server, client, pushed, token, repo_id, message):
    _, error = client.attempt(f"check_push_access({repo_id!r}, {token!r})")
    assert re.search(f"PermissionError: .*{message}", error)
    assert f"{token}" not in error.split("PermissionError:")[-1] or token is None


def test_organization_a_token_may_write_to_is_accepted(client):
    assert client.run(f"print(check_push_access('lab/model', {TOKEN!r}))").strip() == "lab/model"


def push_with_faults(client, folder, repo_id):
    printed, error = client.attempt(f"push_run({str(folder)!r}, {repo_id!r}, token={TOKEN!r}, fold=True)")
    assert TOKEN not in printed + (error or "")
    return (error or "").strip().splitlines()[-1:]


@pytest.mark.parametrize(
    "fault",
    [
        {"pattern": "PUT /lfs/", "status": 503, "times": 1},
        {"pattern": "PUT /lfs/", "drop_after": 100_000, "times": 1},
        {"pattern": "POST .*/preupload/", "status": 429, "times": 1, "headers": {"Retry-After": "0"}},
    ],
    ids=["503", "connection cut in the middle of the weights", "429"],
)
def test_push_survives_a_passing_failure(server, client, run, fault):
    name = f"alice/passing-{fault.get('status', 'cut')}"
    fault = server.fail(**fault)
    assert push_with_faults(client, run, name) == []
    assert fault.times == 0
    assert "model.safetensors" in server.files(name)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"pattern": "PUT /lfs/", "status": 507}, "507"),
        ({"pattern": "POST .*/commit/", "drop_after": 50}, "failed"),
        ({"pattern": "POST .*/commit/", "status": 500}, "500"),
        pytest.param(
            {"pattern": "POST .*/preupload", "drop_after": 0},
            "OSError: the push to 'alice/ants' failed",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {"pattern": "POST /api/repos/create", "status": 503}, "answered HTTP 503", marks=pytest.mark.long
        ),
        ({"pattern": "POST /api/repos/create", "drop_after": 0}, "could not be reached"),
    ],
    ids=[
        "disk full",
        "cut in the middle of the commit",
        "500",
        "cut before the upload",
        "down for maintenance",
        "no connection",
    ],
)
def test_push_that_fails_leaves_the_repository_as_it_was(server, client, run, pushed, fault, message):
    before, titles = server.files("alice/ants"), server.titles("alice/ants")
    server.fail(**fault)
    _, error = client.attempt(f"push_run({str(run)!r}, 'alice/ants', token={TOKEN!r}, fold=True)")
    assert re.search(message, error.strip().splitlines()[-1]), error
    assert (server.files("alice/ants"), server.titles("alice/ants")) == (before, titles)


def test_file_that_would_reveal_a_token_or_a_path_is_not_pushed(server, client, run, tmp_path):
    for secret, what in ((TOKEN, "a token or password"), (str(tmp_path), "a path of this machine")):
        _, error = client.attempt(f"""
            os.environ["HF_TOKEN"] = {TOKEN!r}
            copy = {str(tmp_path / "copy")!r}
            shutil.copytree({str(run)!r}, copy, dirs_exist_ok=True)
            config = json.loads(Path(copy, "config.json").read_text())
            Path(copy, "config.json").write_text(json.dumps(config | {{"pretrained_file": {secret!r} + "/copy"}}))
            try:
                push_run(copy, "alice/leaky")
            finally:
                del os.environ["HF_TOKEN"]
        """)
        assert f"ValueError: config.json holds {what}, so nothing was published" in error
    assert server.files("alice/leaky") == {}


def test_command_line_tells_its_errors_in_one_line(client, tmp_path):
    for program, message in (
        ("main(['push', 'nowhere', '--repo-id', 'alice/x'])", "error: there is no model in nowhere"),
        ("main(['export', 'nowhere', 'out'])", "error: there is no model in nowhere"),
        ("main(['pull', 'alice/absent', 'out'])", "error: "),
    ):
        _, error = client.attempt(f"from pgt_hf.__main__ import main\n{program}")
        assert f"SystemExit: {message}" in error


def test_export_writes_what_a_push_would_bring(client, run, pushed, tmp_path):
    client.run(f"""
        from pgt_hf.__main__ import main
        main(["export", {str(run)!r}, {str(tmp_path / "release")!r}, "--repo-id", "alice/ants"])
    """)
    assert {path.name: path.read_bytes() for path in (tmp_path / "release").iterdir()} == pushed


def test_network_of_transformers_alone_is_published_with_code_that_runs(server, client, tmp_path):
    client.run(f"""
        import transformers
        config = transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                         intermediate_size=16, num_labels=3)
        model = transformers.BertForSequenceClassification(config).eval()
        model.save_pretrained({str(tmp_path)!r})
        push_run({str(tmp_path)!r}, "alice/text", token={TOKEN!r})
        there = transformers.AutoModelForSequenceClassification.from_pretrained("alice/text").eval()
        with torch.no_grad():
            words = torch.arange(10)[None]
            assert torch.equal(there(words).logits, model(words).logits)
    """)
    card = ModelCard(server.files("alice/text")["README.md"].decode())
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    client.run(re.findall(r"^```python\n(.*?)^```$", card.content, re.DOTALL | re.MULTILINE)[0], common="")
