from __future__ import annotations

import pytest
import yaml

from training.recipe import build_recipe, default_recipe, dump_recipe, merge, parse_assignments, read_recipe
from wsss_deploy.errors import RecipeError


def test_defaults_are_valid_for_every_supervision():
    for supervision in ("masks", "scribbles", "points", "auto"):
        recipe = build_recipe(default_recipe(supervision, 300))
        assert recipe.supervision == supervision
        assert recipe.optimisation.iterations == 500
    assert build_recipe(default_recipe("masks", 300)).method.name == "supervised"
    points = build_recipe(default_recipe("points", 300)).method
    assert points.name == "gated_crf"
    assert points.propagate.alone
    assert points.propagate.tokens.images
    assert not build_recipe(default_recipe("points", 300, background=False)).method.propagate.tokens.images
    # Without weights there are no features to rely on, and who names a method gets that one.
    assert build_recipe(default_recipe("points", 300, pretrained=False)).method.teacher is not None
    assert build_recipe(default_recipe("points", 300, method="gated_crf")).method.propagate is None


def test_scribbles_are_regularised_at_the_images_resolution():
    for supervision, stride in (("scribbles", 1), ("auto", 1), ("points", 4)):
        method = build_recipe(default_recipe(supervision, 300)).method
        assert (method.name, method.stride, method.radius) == ("gated_crf", stride, 5)


def test_short_runs_of_dfr_begin_its_terms_later():
    for supervision in ("scribbles", "auto"):
        dfr = build_recipe(default_recipe(supervision, 300, method="dfr")).method
        assert (dfr.name, dfr.radius, dfr.absent) == ("dfr", 2, None)
        assert 0.1 < dfr.start < dfr.deep_start
    points = build_recipe(default_recipe("points", 300, method="dfr")).method
    assert points.radius == 5
    assert points.absent is not None
    own = merge(default_recipe("scribbles", 300, method="dfr"), {"method": {"name": "dfr", "start": 0.1}})
    assert build_recipe(own).method.start == 0.1
    assert build_recipe(own).method.radius == 2


def test_layers_that_know_nothing_do_not_stay_as_they_are():
    def options(method, pretrained):
        return build_recipe(default_recipe("tags", 300, pretrained, method=method)).method

    assert options("tscd", True).frozen > 0
    assert options("sfc", True).cam_frozen > 0
    assert options("tscd", False).frozen == 0
    assert options("sfc", False).cam_frozen == 0
    assert options(None, False).cam_frozen == 0


def test_larger_sets_train_longer():
    assert build_recipe(default_recipe("points", 10_000)).optimisation.iterations == 4000


def test_unknown_keys_name_the_nearest_and_all_problems_come_at_once():
    values = {
        "method": {"name": "gated_crf", "wieght": 1},
        "optimisation": {"iterations": 0, "learning_rat": 1},
        "augmentation": {"sise": 3},
        "sed": 1,
    }
    with pytest.raises(RecipeError) as caught:
        build_recipe(values, "mine.yaml")
    text = "\n".join(caught.value.problems)
    assert "method.wieght: unknown key; did you mean 'weight'?" in text
    assert "optimisation.learning_rat: unknown key; did you mean 'learning_rate'?" in text
    assert "augmentation.sise: unknown key; did you mean 'size'?" in text
    assert "sed: unknown key; did you mean 'seed'?" in text
    assert "optimisation.iterations" in text
    assert "greater than or equal to 1" in text
    assert len(caught.value.problems) == 5


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"iterations": 30}, "iterations: unknown key; did you mean 'optimisation.iterations'?"),
        ({"training": {"batch_size": 2}}, "training: unknown key; did you mean 'optimisation.batch_size'?"),
        ({"model": {"seed": 1}}, "model.seed: unknown key; did you mean 'seed' or 'simulation.seed'?"),
        # Another method's option, where it would be that method's; and every method has a name.
        ({"method": {"name": "partial_ce", "radius": 5}}, "method.radius: unknown key; did you mean 'spread'?"),
        ({"model": {"name": "vit"}}, "model.name: unknown key; known: "),
    ],
)
def test_a_known_key_in_a_wrong_section_is_told_its_place(values, hint):
    with pytest.raises(RecipeError) as caught:
        build_recipe({"method": {"name": "gated_crf"}} | values)
    (problem,) = caught.value.problems
    assert hint in problem


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(RecipeError, match="no method 'gated'; did you mean 'gated_crf'"):
        build_recipe({"method": {"name": "gated"}})
    with pytest.raises(RecipeError, match=r"no method 'zzz'; known: .*partial_ce, .*tscd"):
        build_recipe({"method": {"name": "zzz"}})


def test_the_dump_reads_back_equal(tmp_path):
    recipe = build_recipe(merge(default_recipe("scribbles", 10), {"seed": 3, "method": {"weight": 0.2}}))
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    assert build_recipe(read_recipe(path)) == recipe
    assert recipe.method.weight == 0.2


def test_another_method_drops_the_options_of_the_first():
    base = {"method": {"name": "gated_crf", "weight": 0.3}}
    assert merge(base, {"method": {"name": "partial_ce"}}) == {"method": {"name": "partial_ce"}}
    assert merge(base, {"method": {"weight": 0.5}}) == {"method": {"name": "gated_crf", "weight": 0.5}}
    cams = {"cams": {"kind": "classifier", "depths": [1.0]}}
    assert merge(cams, {"cams": {"kind": "shared_feature"}}) == {"cams": {"kind": "shared_feature"}}
    assert merge({"cams": {"scales": [1.0]}}, {"cams": {"kind": "tokens"}}) == {
        "cams": {"scales": [1.0], "kind": "tokens"}
    }


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3), ("none", "none"), ("[1, 2]", [1, 2])])
def test_assignments_are_yaml_values(text, value):
    assert parse_assignments([f"a.b={text}"]) == {"a": {"b": value}}


@pytest.mark.parametrize("text", ["a.b", "=3", "a..b=1", "a=[1"])
def test_bad_assignments(text):
    with pytest.raises(RecipeError):
        parse_assignments([text])


@pytest.mark.parametrize(("content", "words"), [("- a\n- b\n", "list"), ("a: [1", "YAML"), ("\x00", "YAML")])
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=words):
        read_recipe(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_yaml_of_the_dump_is_plain(tmp_path):
    values = yaml.safe_load(dump_recipe(build_recipe(default_recipe("scribbles", 10))))
    assert values["method"]["name"] == "gated_crf"


def test_off_is_a_name_and_false_is_not(tmp_path):
    (tmp_path / "recipe.yaml").write_text("class_weights: off\ndeterministic: false\nflag: True\n")
    assert read_recipe(tmp_path / "recipe.yaml") == {"class_weights": "off", "deterministic": False, "flag": True}
    assert parse_assignments(["method.labels.refiner=off"]) == {"method": {"labels": {"refiner": "off"}}}


def test_kinds_of_maps_are_named_in_errors():
    with pytest.raises(RecipeError, match=r"method\.cams\.kind: no kind 'foo'"):
        build_recipe({"method": {"name": "tags", "cams": {"kind": "foo"}}})
    with pytest.raises(RecipeError, match=r"method\.cams\.depths: unknown key; did you mean 'depth'"):
        build_recipe({"method": {"name": "tags", "cams": {"depths": [1.0]}}})


def test_options_may_come_before_the_name_of_their_method() -> None:
    texts = ["method.cams.pooling=0.1", "method.name=tags"]
    expected = {"method": {"cams": {"pooling": 0.1}, "name": "tags"}}
    assert parse_assignments(texts) == expected
    assert parse_assignments(texts[::-1]) == expected
