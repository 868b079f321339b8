"""Small models and samples that several test files share.

Imports of granvit are inside the fixtures, so that the kernels'
tests do without it.
"""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

# Both are read early: by Triton when it is imported, which transformers does, and by cuBLAS.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the interpreter runs the GPU's kernels
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms want of it
# Processes that test at the same time share the cores, and so do those that they start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHAT_TEMPLATE = (
    "<bos>Be brief.\n{% for m in messages %}{{ m.role }}:\n{{ m.content | trim }}"
    "{{ '\n' if m.role == 'user' else '<eos>' }}{% endfor %}{{ 'assistant:\n' if add_generation_prompt }}"
)
TASKS = ("global_caption", "bbox2caption", "caption2bbox")
CAPTIONS = ("a red striped circle", "the blue star on the left", "OPEN 24 HOURS", "two green dotted squares")


def make_sample(seed: int, height: int = 48, width: int = 64, regions: int = 3) -> SimpleNamespace:
    """A sample of noise with random boxes, of the attributes that questions and packing read."""
    generator = torch.Generator().manual_seed(seed)
    boxed = []
    for i in range(regions):
        x, y, w, h = torch.rand(4, generator=generator).tolist()
        box = (x * 0.5, y * 0.5, x * 0.5 + 0.1 + w * 0.4, y * 0.5 + 0.1 + h * 0.4)
        caption = f"{CAPTIONS[i % len(CAPTIONS)]} {seed}"
        boxed.append(SimpleNamespace(box=box, caption=caption, kind="natural", score=None))
    image = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    caption = f"a scene with {regions} things"
    chat = (("how many things?", f"{regions} of them"), ("which one is left?", CAPTIONS[1]), ("sure?", "yes"))
    return SimpleNamespace(
        id=f"sample-{seed}", image=image, caption=caption, regions=tuple(boxed), source="test",
        conversations=(chat, chat[1:])[: seed % 3],
    )  # fmt: skip


@pytest.fixture
def tab():
    """A page of a headless Chromium; the hosts that it asked are in tab.hosts, and what its console said in
    tab.said."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("needs a Chromium")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.hosts = set()
        page.on("request", lambda request: page.hosts.update(re.findall(r"^https?://([^:/]+)", request.url)))
        page.said = []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        yield page
        browser.close()


@pytest.fixture(scope="session")
def samples():
    """Four samples of different sizes and numbers of regions, one without any."""
    return [
        make_sample(0),
        make_sample(1, 80, 40, 2),
        make_sample(2, 64, 64, 5),
        make_sample(3, 33, 90, 0),
    ]


@pytest.fixture(scope="session")
def llm_folder(samples, tmp_path_factory):
    """llm_folder("llama" or "qwen2") -> a folder of transformers' with such an LLM at tiny size, and its tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from granvit.toy.tiny import train_tokenizer

    def build(family: str):
        folder = tmp_path_factory.getbasetemp() / f"tiny-{family}"
        if not folder.exists():
            tokenizer = train_tokenizer([region.caption for sample in samples for region in sample.regions], 300)
            sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            sizes |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
            if family == "llama":
                config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
            else:  # as Qwen's own: grouped heads, biases, a chat template, and a table longer than the tokenizer
                tokenizer.chat_template = CHAT_TEMPLATE
                config = Qwen2Config(vocab_size=len(tokenizer) + 9, num_key_value_heads=2, **sizes)
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tiny(samples):
    """tiny(**options) -> (model, processor): a two-layer model, drawn with one seed and in eval mode."""

    def build(**options):
        from granvit.questions.prompts import questions
        from granvit.toy.tiny import TinyLLM, TinyVision, build_tiny

        texts = [
            text
            for sample in samples
            for question in questions(sample, TASKS, "both", "text")
            for text in (question.prompt, question.answer)
        ]
        torch.manual_seed(0)
        vision = TinyVision(width=32, layers=2, heads=2, mlp=64, table=4)
        llm = TinyLLM(width=48, layers=2, heads=4, mlp=64, vocab=400)
        options = {"max_image_tokens": 16, "bins": 16} | options
        model, processor = build_tiny(texts, vision, llm, **options)
        return model.eval(), processor

    return build


@pytest.fixture(scope="session")
def sample_set(tmp_path_factory):
    """A sample set of few images: photographs, scenes and pages."""
    from granvit.data.sample import build_sample

    path = tmp_path_factory.mktemp("data") / "sample"
    build_sample(path, images=80, seed=0, workers=1)
    return path


@pytest.fixture(scope="session")
def chats(sample_set, tmp_path_factory):
    """The sample set's pictures with conversations in place of regions."""
    import datasets

    from granvit.data.schema import CHAT_FEATURES

    turns = (("user", "What is it?"), ("assistant", "A picture."), ("user", "Sure?"), ("assistant", "Yes."))
    talk = [{"role": role, "content": text} for role, text in turns]
    changed = {"regions": [], "caption": None, "conversations": [talk, talk[:2]]}
    path = tmp_path_factory.mktemp("chats") / "chats"
    rows = datasets.load_from_disk(str(sample_set))
    rows.map(lambda row: changed, features=CHAT_FEATURES).save_to_disk(path)
    return path


@pytest.fixture(scope="session")
def small_config(sample_set):
    """The smoke preset at a size that runs in seconds; tests choose the output folder."""
    from granvit.train.presets import PRESETS, Data, Model

    smoke = PRESETS["smoke"]
    few = {"packs": 2, "warmup_steps": 2, "optimizer": "adamw", "learning_rate": 1e-3}  # which fsdp takes too
    few["eval_every"] = 0  # its own tests have it on
    return replace(
        smoke,
        output="",
        data=Data(path=str(sample_set), eval_images=6, workers=0, fault_budget=0.0),
        model=Model(
            encoder_width=32, encoder_layers=1, encoder_heads=2, llm_width=32, llm_layers=1, llm_heads=2,
            vocabulary=400, max_image_tokens=9, bins=8,
        ),
        warmup=replace(smoke.warmup, steps=3, **few),
        pretrain=replace(smoke.pretrain, steps=6, **few),
        adapt=replace(smoke.adapt, steps=4, **few),
        checkpoint_every=2,
        log_every=1,
        threads=1,  # on a busy machine two wait for each other most of the time
        control=False,
        device="cpu",
    )  # fmt: skip
