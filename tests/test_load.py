"""What loading a model does beside reading it: versions, kernels, the weights of the encoder."""

import logging

import pytest
import torch
from test_model import build, sentences

from handler.decoding import kernels
from handler.decoding.model import converted, flatten, load
from model.serving import FORMAT_VERSION, scripted

CPU = torch.device("cpu")


@pytest.mark.parametrize("version", [3, 4])
def test_older_models_are_read(version, tmp_path):
    model = build("sutskever")
    model.format_version = version
    scripted(model).save(str(tmp_path / "model.pt"))
    assert load(str(tmp_path / "model.pt"), CPU).format_version == version


def test_a_gpu_without_kernels_is_told_once(monkeypatch, tmp_path, caplog):
    """Everything that needs a GPU is left out."""
    read = torch.jit.load

    def refused(device):
        raise RuntimeError("no libnvrtc.so.13 on this machine\nmore of it")

    monkeypatch.setattr(torch.jit, "load", lambda path, map_location: read(path))
    monkeypatch.setattr(kernels, "compile_for", refused)
    for name in ("_jit_set_profiling_executor", "_jit_set_profiling_mode"):
        monkeypatch.setattr(torch._C, name, lambda _: None)  # which are the whole process'
    scripted(build("sutskever")).save(str(tmp_path / "model.pt"))
    with caplog.at_level(logging.WARNING):
        model = load(str(tmp_path / "model.pt"), torch.device("cuda", 0))
    assert model.format_version == FORMAT_VERSION
    assert [one.getMessage() for one in caplog.records] == [
        "no kernels of our own: no libnvrtc.so.13 on this machine"
    ]


def flattened(weights, stride, *others):
    """What cuDNN's `_cudnn_rnn_flatten_weight` does to the weights of an LSTM."""
    flat = torch.cat([one.flatten() for one in weights])
    offset = 0
    for one in weights:
        size = one.numel()
        one.set_(flat[offset : offset + size].view_as(one))
        offset += size
    return flat


@pytest.mark.parametrize("weights", [None, "float16"])
def test_the_weights_of_an_encoder_are_one_piece(monkeypatch, tmp_path, weights):
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flattened)
    scripted(build("attention with every option").float()).save(str(tmp_path / "model.pt"))
    model = torch.jit.load(str(tmp_path / "model.pt"))
    source, lengths = sentences(1, 3, 9)
    with torch.no_grad():
        expected = model.encode(source, lengths)
        if weights:
            model = converted(model, torch.device("cuda"), weights)
        flatten(model)
        lstms = [one for one in model.modules() if one.original_name == "LSTM"]
        assert lstms
        for one in lstms:
            assert len({t.untyped_storage().data_ptr() for t in one._flat_weights}) == 1
            assert one.weight_ih_l0.data_ptr() == one._flat_weights[0].data_ptr()
        if weights is None:
            for mine, other in zip(model.encode(source, lengths).attended, expected.attended):
                assert torch.equal(mine, other)


def test_weights_stay_apart_where_there_is_no_cudnn(tmp_path):
    scripted(build("sutskever")).save(str(tmp_path / "model.pt"))
    flatten(torch.jit.load(str(tmp_path / "model.pt")))


def test_new_models_say_that_they_name_the_operators():
    assert FORMAT_VERSION == 4
    code = scripted(build("attention")).readout.code
    assert "seq2serve.attend" in code
