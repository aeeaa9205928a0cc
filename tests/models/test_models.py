"""Model names, weights and adapters: what is refused, and that nothing half-made is left."""

import json

import pytest
import torch
from peft import get_peft_model

from speed_core.files import UserError
from speed_core.models import loading, packages, packed, training
from speed_core.profile import Lora


def test_a_package_with_other_bytes_is_refused_by_its_digest(tmp_path, monkeypatch):
    chunk = tmp_path / "package" / "data" / "chunk"
    chunk.parent.mkdir(parents=True)
    chunk.write_bytes(b"x" * (2 << 20))
    monkeypatch.setattr(packages, "package_folder", lambda name: tmp_path / "package")
    monkeypatch.setenv("SPEED_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="reinstall the packages") as error:
        loading.resolve("package:gemma-3-270m")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("gemma-3-270m-*/complete.json"))


def test_the_prompt_begins_with_bos_exactly_once(tokenizer_folder):
    tokenizer = loading.load_tokenizer(tokenizer_folder)
    for text in ("hello", "<bos>hello", "<bos><bos>hello"):
        ids = loading.encode_prompt(tokenizer, text)
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_the_converted_weights_are_bfloat16_and_know_a_fact(tokenizer_folder):
    from safetensors import safe_open

    with safe_open(f"{tokenizer_folder}/model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}
    model, tokenizer = loading.load_causal_lm(tokenizer_folder), loading.load_tokenizer(tokenizer_folder)
    ids = torch.tensor([loading.encode_prompt(tokenizer, "Water boils at")])
    assert "100" in tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0])


def test_two_folders_with_other_weights_have_other_ids(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    assert loading.weights_id(tmp_path / "a") != loading.weights_id(tmp_path / "b")
    assert loading.weights_id("org/model") == "org/model"


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="adapter_config.json"):
        loading.check_adapter(tmp_path, "package:gemma-3-270m")


def test_a_shallow_encoder_keeps_the_first_layers_and_refuses_more_than_there_are():
    from sentence_transformers import SentenceTransformer

    folder = loading.shallow_encoder("package:all-MiniLM-L6-v2", 1)
    cut, whole = SentenceTransformer(str(folder), device="cpu"), SentenceTransformer(loading.resolve("package:all-MiniLM-L6-v2"))
    assert len(cut[0].model.encoder.layer) == 1 and len(whole[0].model.encoder.layer) == 6
    first, also = cut[0].model.encoder.layer[0].state_dict(), whole[0].model.encoder.layer[0].state_dict()
    assert all(torch.equal(first[k], also[k].to(first[k].device)) for k in first)
    with pytest.raises(UserError, match="has 6 layers, cannot keep 7"):
        loading.shallow_encoder("package:all-MiniLM-L6-v2", 7)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_model_name_with_a_slice_is_that_model_cut_to_its_first_layers(tiny_model, family, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_CACHE", str(tmp_path))
    whole, cut = (loading.load_causal_lm(tiny_model(family) + end, dtype="float32") for end in ("", "[:1]"))
    ids = torch.tensor([[2, 17, 230, 4051]])
    with torch.inference_mode():
        # hidden_states[-1] is normalised already, [1] is what the first layer hands on.
        expected = whole.model.norm(whole.model(ids, output_hidden_states=True).hidden_states[1])
        assert torch.allclose(cut.model(ids).last_hidden_state, expected.to(torch.float32), atol=2e-2)
    assert loading.weights_id(loading.resolve(tiny_model(family) + "[:1]")) != loading.weights_id(tiny_model(family))
    with pytest.raises(UserError, match="has 2 layers, cannot keep 3"):
        loading.resolve(tiny_model(family) + "[:3]")


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_prepacked_model_has_the_same_logits(tiny_model, family):
    ids = torch.tensor([[2, 17, 230, 4051], [2, 9, 9, 9]])
    with torch.inference_mode():
        expected = loading.load_causal_lm(tiny_model(family), dtype="float32")(ids).logits
        found = packed.pack(loading.load_causal_lm(tiny_model(family), dtype="float32"))(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_a_packed_model_trains_its_adapter_with_the_same_gradients(tiny_model, family):
    ids, found = torch.tensor([[2, 17, 230, 4051], [2, 9, 9, 9]]), []
    for pack in (lambda model: model, lambda model: packed.pack(model, training=True)):
        torch.manual_seed(0)
        model = loading.load_causal_lm(tiny_model(family), dtype="float32")
        model = pack(get_peft_model(model, training.lora_config(Lora(rank=4, alpha=8), model)))
        for name, part in model.named_parameters():
            if "lora_B" in name:  # these begin as zero, and then those of A have no gradient
                torch.nn.init.normal_(part, std=0.02, generator=torch.Generator().manual_seed(1))
        model(ids, labels=ids).loss.backward()
        found.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    plain, fast = found
    assert plain.keys() == fast.keys() and all("lora_" in name for name in plain)
    assert all(torch.allclose(plain[name], fast[name], atol=1e-6, rtol=1e-4) for name in plain)


def test_what_a_folder_holds_beside_its_weights_decides_too_and_a_package_is_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_CACHE", str(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, pooling in ((one, "mean"), (other, "max")):
        (folder / "1_Pooling").mkdir(parents=True)
        (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
        (folder / "model.safetensors").write_bytes(b"the same")
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"mode": pooling}))
    assert loading.weights_id(one) == loading.weights_id(other)
    assert loading.settings_id(str(one)) != loading.settings_id(str(other))
    assert loading.named(str(one)).partition("@")[2] != loading.named(str(other)).partition("@")[2]
    assert loading.settings_id("package:gemma-3-270m") == loading.settings_id("org/model") == ""
    assert loading.named("package:all-MiniLM-L6-v2") == "package:all-MiniLM-L6-v2"
    before = loading.settings_id(str(one))
    (one / "README.md").write_text("more")
    (one / "checkpoint-5").mkdir()
    (one / "checkpoint-5" / "config.json").write_text("{}")
    assert loading.settings_id(str(one)) == loading.settings_id(f"{one}[:2]") == before
    assert loading.named(f"{one}[:2]").startswith(f"{one}[:2]@")
    (one / "1_Pooling" / "model.safetensors").write_bytes(b"weights of a module")
    assert loading.settings_id(str(one)) != before
    (one / "complete.json").write_text("{}")  # made by `loading` itself, from something that has a name
    assert loading.settings_id(str(one)) == ""
    (other / "modules.json").write_text("[{}]")
    with pytest.raises(UserError, match="cannot be read"):
        loading.settings_id(str(other))


def test_two_encoders_that_share_weights_give_two_shallow_students(tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(loading.resolve("package:all-MiniLM-L6-v2"), device="cpu")
    monkeypatch.setenv("SPEED_CACHE", str(tmp_path / "cache"))
    for name, length in (("one", 256), ("other", 16)):
        whole.max_seq_length = length
        whole.save_pretrained(str(tmp_path / name), create_model_card=False)
    made = [loading.shallow_encoder(str(tmp_path / name), 1) for name in ("one", "other")]
    assert [SentenceTransformer(str(f), device="cpu").max_seq_length for f in made] == [256, 16]
