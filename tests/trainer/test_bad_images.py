"""Images that cannot be read are counted once each, whichever processes met them."""

import pytest
from launch import TWO, run

pytestmark = pytest.mark.slow

PROGRAM = """
import torch
from datasets import Dataset, Image
from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.images import ImageDataset, ImageTransform, collate, create_model, load_image_dataset

digits = load_image_dataset("digits")["validation"].select(range(51))
rows = digits.cast_column("image", Image(decode=False)).to_list()
for bad in (5, 20):
    rows[bad]["image"]["bytes"] = rows[bad]["image"]["bytes"][:60]
model = create_model("test_resnet", digits.features["label"].names, image_size=32)
images = ImageDataset(
    Dataset.from_list(rows, features=digits.features),
    ImageTransform(model.config.pretrained_cfg, training=False, normalize=False),
    on_bad_image="skip",
)
args = ImageTrainingArguments("out", per_device_eval_batch_size=8, report_to="none", disable_tqdm=True)
trainer = ImageTrainer(model, args, eval_dataset=images, data_collator=collate)
trainer.evaluate()
by_process = trainer.accelerator.gather(torch.tensor([images.bad_images])).tolist()
in_all = trainer.bad_images()
trainer.accelerator.print("found", sum(by_process), in_all)
trainer.end()
"""


def test_an_image_that_evens_out_the_last_batch_is_counted_once(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    assert "found 3 2" in run(*TWO, "program.py", cwd=tmp_path).stdout  # of 51 images, one is read twice
