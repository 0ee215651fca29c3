import pytest

from trueward.evaluate.verdicts import (
    Measured,
    collapsed_std_verdict,
    error_verdict,
    identical_members_verdict,
    nominal_verdict,
    out_of_distribution_verdict,
    single_member_verdict,
)


def measured(value: float, low: float, high: float) -> Measured:
    return Measured(value=value, low=low, high=high)


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (identical_members_verdict(0.99, 0.5), "nearly identical"),
        (identical_members_verdict(0.989, 0.1), "nearly identical"),
        (identical_members_verdict(0.989, 0.101), "Members differ"),
        (identical_members_verdict(None, 0.1), "cannot be compared"),
        (collapsed_std_verdict(1.1, 0.0), "have collapsed"),
        (collapsed_std_verdict(1.11, 0.5), "have not collapsed"),
        (collapsed_std_verdict(1.11, 0.51), "have collapsed"),
        (error_verdict("between", measured(0.1, 0.01, 0.2), None), "larger where the reward errs"),
        (error_verdict("between", measured(0.1, 0.0, 0.2), None), "unrelated to error"),
        (
            error_verdict("between", measured(0.1, -0.1, 0.3), measured(-0.1, -0.2, -0.01)),
            "smaller where the reward errs",
        ),
        (error_verdict("between", None, None), "same for all pairs"),
        (out_of_distribution_verdict("own", {"a": measured(0.6, 0.51, 0.7)}), "rises on every"),
        (out_of_distribution_verdict("own", {"a": measured(0.7, 0.5, 0.9)}), "no better than"),
        (out_of_distribution_verdict("own", {"a": measured(0.59, 0.58, 0.6)}), "no better than"),
        (nominal_verdict(0.9, 0.4, measured(0.1, 0.05, 0.2)), "One member is nominal for 90%"),
        (nominal_verdict(0.89, 0.4, measured(0.1, 0.05, 0.2)), "better one to ask"),
        (nominal_verdict(0.5, 1.0, measured(0.1, 0.0, 0.2)), "as if at random"),
        (nominal_verdict(0.5, 1.0, measured(-0.1, -0.2, -0.01)), "worse one to ask"),
        (single_member_verdict(1, has_own_std=True), "only its own std is left"),
        (single_member_verdict(1, has_own_std=False), "no uncertainty at all"),
    ],
)
def test_verdicts_turn_at_their_thresholds_and_are_one_sentence(verdict: str, words: str) -> None:
    assert words in verdict
    assert verdict.endswith(".")
    assert ". " not in verdict
    assert "  " not in verdict


def test_kinds_are_sorted_by_whether_the_uncertainty_rises_on_them() -> None:
    verdict = out_of_distribution_verdict(
        "between", {"a": measured(0.93, 0.9, 0.96), "b": measured(0.51, 0.4, 0.6)}
    )
    assert verdict.startswith("The std between members rises on some")
    assert "(AUROC a 0.93) but is no better than chance, or hardly, on other (b 0.51)" in verdict
    assert out_of_distribution_verdict("between", {}) == ""
    assert single_member_verdict(2, has_own_std=True) == ""
