"""projects/memory_benchmark: its arms are what their names say; interrupted runs resume."""

import pytest
import torch

from tests.d2.tiny import tiny_cfg

CPU = torch.device("cpu")
ARMS = ("stock", "stock-checkpoint", "our-attention-checkpoint", "frozen", "dr2net-exact")


@pytest.fixture
def scripts():
    # They import Detectron2.
    from projects.memory_benchmark import arms, measure, store

    return store, arms, measure


@pytest.fixture
def cfg(tmp_path):
    mask = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead")
    return tiny_cfg(tmp_path, *mask, "MODEL.ROI_MASK_HEAD.NUM_CONV", 1)


@pytest.fixture
def work(scripts):
    return scripts[0].Work("detector", "ti", None, 64, 2, "fp32", 3, 0)


def inputs_of(arms, work):
    """The benchmark's config has COCO's 80 classes; the tiny detector has 10."""
    inputs, gradient = arms.make_inputs(work, 32, CPU)
    for image in inputs:
        image["instances"].gt_classes %= 10
    return inputs, gradient


def test_arms_have_the_same_weights_and_the_same_loss(scripts, cfg, work):
    _, arms, _ = scripts
    networks = arms.build_networks(cfg, "detector", ARMS, CPU, seed=0)
    weights = [
        {name: p.data_ptr() for name, p in network.module.named_parameters()}
        for network in networks.values()
    ]
    assert all(one == weights[0] for one in weights)
    for network in networks.values():
        # Relative positions start at zero, where a wrong one would not show.
        torch.manual_seed(1)
        for name, parameter in network.module.named_parameters():
            if "rel_pos" in name:
                torch.nn.init.normal_(parameter)
    losses, gradients = {}, {}
    for arm, network in networks.items():
        with arms.gradients(network):
            step = arms.take_step(network, *inputs_of(arms, work), work)
            losses[arm] = float(step.output)
            gradients[arm] = {
                name: p.grad.clone() for name, p in network.module.named_parameters()
                if p.grad is not None
            }  # fmt: skip
        assert all(parameter.grad is None for parameter in network.module.parameters())
        assert step.foreground
    for arm in ("stock-checkpoint", "our-attention-checkpoint"):
        assert losses[arm] == pytest.approx(losses["stock"], rel=1e-4)
        for name, expected in gradients["stock"].items():
            difference = (gradients[arm][name] - expected).norm() / expected.norm()
            assert difference < 1e-3 or expected.norm() < 1e-4, (arm, name)
    assert losses["frozen"] == pytest.approx(losses["stock"], rel=1e-6)
    assert losses["dr2net-exact"] != pytest.approx(losses["stock"], rel=1e-6)
    trained = {name.startswith("backbone.net.") for name in gradients["frozen"]}
    assert trained == {False}
    assert set(gradients["dr2net-exact"]) == set(gradients["stock"])


def test_memory_of_the_arms_is_in_their_order(scripts, cfg, work):
    _, arms, _ = scripts
    networks = arms.build_networks(cfg, "detector", ARMS, CPU, seed=0)
    found = {
        arm: arms.measure_memory(network, *inputs_of(arms, work), work)
        for arm, network in networks.items()
    }
    saved = [found[arm]["saved_bytes"] for arm in ("stock", "stock-checkpoint", "dr2net-exact")]
    assert saved == sorted(saved, reverse=True)
    for row in found.values():
        assert row["peak_bytes"] > row["saved_bytes"] / 2 > 0
        held = row["peak_bytes"] + row["weight_bytes"] + row["gradient_bytes"]
        assert row["total_bytes"] == held
    assert found["frozen"]["gradient_bytes"] < found["stock"]["gradient_bytes"]


def test_each_lean_part_saves_less(scripts, cfg, work):
    store, arms, _ = scripts
    found = {}
    for arm, network in arms.build_networks(cfg, "detector", store.LEAN_ARMS, CPU, 0).items():
        row = arms.measure_memory(network, *inputs_of(arms, work), work)
        found[arm] = row["saved_bytes"], row["output"]
        assert network.vit.reversible and network.vit.arithmetic == "exact"
    saved, losses = zip(*found.values(), strict=True)
    assert saved[4] < min(saved[1:4]) and max(saved[1:4]) < saved[0]
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_vit_alone(scripts, cfg, work, precision):
    _, arms, _ = scripts
    work = work._replace(scope="vit", precision=precision)
    cfg.MODEL.VIT.PATCH_SIZE = 16
    features = {}
    for arm, network in arms.build_networks(cfg, "vit", ARMS[:3], CPU, seed=0).items():
        with arms.gradients(network):
            features[arm] = arms.take_step(network, *arms.make_inputs(work, 32, CPU), work).output
    for found in features.values():
        torch.testing.assert_close(found, features["stock"], rtol=0.02, atol=0.02)


def test_an_interrupted_run_goes_on_where_it_stopped(scripts, cfg, work, tmp_path, monkeypatch):
    store, arms, measure = scripts
    path, calls = tmp_path / "results.json", []
    step, made = arms.take_step, inputs_of(arms, work)
    monkeypatch.setattr(arms, "load_config", lambda *_: cfg)
    monkeypatch.setattr(arms, "make_inputs", lambda *_: made)

    def timed(network, *given):
        calls.append(network.arm)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return step(network, *given)

    def counted(network, *given):
        if network.arm == "dr2net-exact":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"saved_bytes": 2, "peak_bytes": 3}

    monkeypatch.setattr(arms, "take_step", timed)
    monkeypatch.setattr(arms, "measure_memory", counted)
    chosen, stop_at = ("stock", "dr2net-exact", "frozen"), 4
    setting = {"device": "none"}
    with pytest.raises(KeyboardInterrupt):
        measure.Bench(store.Results(path, setting), chosen, CPU, rounds=3).run([work])
    # Two rounds of both arms, the second one interrupted in its last arm.
    assert calls == ["stock", "frozen", "stock", "frozen"]

    calls.clear()
    stop_at = 0
    bench = measure.Bench(store.Results(path, setting), chosen, CPU, rounds=3)
    bench.run([work])
    # Each arm is warmed up first.
    assert calls == ["frozen", "frozen", "stock", "stock", "frozen"]
    rows = {row["arm"]: row for row in store.Results(path).rows}
    assert [store.turns(rows[arm]) for arm in chosen] == [3, 0, 3]
    assert rows["dr2net-exact"]["status"] == "out of memory"

    calls.clear()
    bench.run([work])
    assert calls == []


def test_time_that_is_up_ends_the_run(scripts, cfg, work, tmp_path, monkeypatch):
    store, arms, measure = scripts
    monkeypatch.setattr(arms, "load_config", lambda *_: cfg)
    results = store.Results(tmp_path / "results.json", {})
    with pytest.raises(TimeoutError):
        measure.Bench(results, ARMS, CPU, rounds=1, until=0.0).run([work])
    assert results.rows == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "100"], "--sizes has 100; use multiples of 32 from 64 to 8192"),
        (["--depths", "2"], "--depths has 2; use from 4 to 48"),
        (["--output", "/missing/results.json"], "no folder /missing"),
        (["--device", "cuda"], "no CUDA GPU"),
    ],
)
def test_arguments_that_cannot_be_exit_with_2(scripts, words, message, capsys):
    if words[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert scripts[2].main(words) == 2
    assert message in capsys.readouterr().err


def test_presets_and_axes(scripts):
    _, arms, measure = scripts
    gpu = measure.plan(measure.parse_arguments(["--preset", "gpu"]))
    assert len(set(gpu)) == len(gpu)
    assert {work.size for work in gpu} >= {512, 3072}
    words = ["--preset", "gpu", "--sizes", "512", "--models", "ti"]
    assert {(w.model, w.size) for w in measure.plan(measure.parse_arguments(words))} == {
        ("ti", 512)
    }
    cfg = arms.load_config("b", 6)
    assert cfg.MODEL.VIT.WINDOW_BLOCK_INDEXES == [1, 4]
    assert arms.load_config("h").MODEL.VIT.WINDOW_BLOCK_INDEXES[6:8] == [6, 8]
