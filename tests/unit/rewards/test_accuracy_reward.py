"""Right answers in many spellings count, wrong ones do not, and nothing that a model writes breaks the reward."""

import math
import threading
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_intuitor.config.schema import AccuracyConfig
from megatron_intuitor.contracts import Prompt, Rollout, RolloutGroup
from megatron_intuitor.rewards import AccuracyReward, accuracy, answer_is_correct, judge_answer

PATTERN = r"#(-?[\d,]+)$"

# (answer in the last box, gold answer, same?)
BOXED = [
    ("18", "18", True),
    ("18", "81", False),
    ("1/2", "0.5", True),
    (r"\frac12", "1/2", True),
    (r"\dfrac{3}{6}", r"\frac{1}{2}", True),
    (r"-\frac{2}{3}", "-2/3", True),
    (r"\frac{2}{3}", "-2/3", False),
    (r"3\frac{1}{2}", "7/2", True),
    ("0.3333", "1/3", False),
    ("2.50", "2.5", True),
    ("3.1416", r"\pi", False),
    (r"50\%", "0.5", True),
    ("1{,}000", "1000", True),
    (r"1\,000", "1,000", True),
    (r"1\,000", "0", False),
    ("1 000", "1000", True),
    ("1,234,567", "1234567", True),
    ("1,234", "1.234", False),
    ("12.", "12", True),
    (r"\$18", "18", True),
    ("€18", "18", True),
    ("18 dollars", "18", True),
    ("10 miles per hour", "10", True),
    (r"18\text{ cm}", "18", True),
    (r"90^\circ", "90", True),
    ("x=5", "5", True),
    ("x=6", "5", False),
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    (r"2\sqrt{3}+1", "2", False),
    ("x^2+2x+1", "(x+1)^2", True),
    ("(1,2)", "(1, 2)", True),
    ("(2,1)", "(1,2)", False),
    (r"\{2,1\}", r"\{1,2\}", True),
    (r"(-\infty,3]", "3", False),
    (r"\left(3,\frac{\pi}{2}\right)", r"(3, \pi/2)", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", True),
    (r"\text{Evelyn}", "Evelyn", True),
    ("Evelyn", r"\text{Eve}", False),
    (r"\text{(A)}", "A", True),
    ("", "5", False),
    ("", "", False),
    (r"\frac{1}{", "1", False),
]


@pytest.mark.parametrize(("answer", "gold", "same"), BOXED)
def test_boxed_answers(answer, gold, same):
    text = rf"First \boxed{{77}}, no: so we get $\boxed{{{answer}}}$. I hope it is correct."
    assert judge_answer(text, gold) == accuracy.Verdict(correct=same)
    assert answer_is_correct(text, rf"Long solution, hence \boxed{{{gold}}}.") is same


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("She has 3*4=12 left, and the answer is 12.", "#### 12", True),
        ("48+24 = 72 clips altogether, so the final answer is $72$.", "He sold 24.\n#### 72", True),
        ("The answer is 1,080 dollars.", "<<2*540=1080>>\n#### 1,080", True),
        ("The answer is: 70,000", "#### 70000", True),
        ("The answer is -3", "#### -3", True),
        ("The answer is 3", "#### -3", False),
        ("The answer is 12. No, the answer is 13.", "#### 12", False),
        (r"We find \(\frac{3}{4}\)", r"so \boxed{\frac34}", True),
        ("I do not know", "#### 12", False),
        ("", "#### 12", False),
    ],
)
def test_answers_that_math_verify_finds(text, gold, right):
    assert answer_is_correct(text, gold) is right


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"\boxed{1} and \boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        ("}} {", None),
        ("plain", None),
    ],
)
def test_last_boxed(text, boxed):
    assert accuracy.last_boxed(text) == boxed


@settings(deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(-3, 3), st.booleans(), st.booleans())
def test_integers_in_every_spelling(value, offset, commas, boxed):
    written = f"{value:,}" if commas else str(value)
    text = rf"hence \boxed{{{written}}}." if boxed else f"9+9=18;#{written}"
    pattern = "" if boxed else PATTERN
    for gold in (f"{value + offset}", f"{value + offset:,}", f"steps\n#### {value + offset}"):
        assert answer_is_correct(text, gold, answer_pattern=pattern) is (offset == 0)


@settings(max_examples=40, deadline=None)
@given(st.fractions(-50, 50, max_denominator=60), st.integers(1, 9), st.sampled_from([0, 1, -1]))
def test_fractions_need_not_be_reduced(value, scale, offset):
    other = value + offset * Fraction(1, 7)
    text = rf"\boxed{{\frac{{{value.numerator * scale}}}{{{value.denominator * scale}}}}}"
    assert answer_is_correct(text, f"{other.numerator}/{other.denominator}") is (offset == 0)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from(r"\{}$#()[]^_+-*/=.,:%0129xfrac boxed" + "\n"), max_size=60))
def test_no_text_breaks_it(text):
    for pattern in ("", PATTERN):
        assert judge_answer(text, "12345", answer_pattern=pattern).correct in {True, False}


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1+2=3;#3", True),
        ("#4;#3", True),
        ("#3;#4", False),
        ("#3;", False),
        (r"\boxed{3}", False),
        ("", False),
    ],
)
def test_the_pattern_decides_and_its_last_match_counts(text, right):
    assert answer_is_correct(text, "3", answer_pattern=PATTERN) is right


@pytest.mark.parametrize(("answer", "gold", "same"), [("-0", "0", True), ("007", "7", True), ("-5", "5", False)])
def test_signs_and_leading_zeros(answer, gold, same):
    assert answer_is_correct(f"#{answer}", gold, answer_pattern=PATTERN) is same


def test_endless_digits_are_just_wrong():
    assert judge_answer("#" + "1" * 20_000, "5", answer_pattern=PATTERN) == accuracy.Verdict(correct=False)
    assert not answer_is_correct("so it is " + "1" * 20_000, "5")


def test_a_pattern_whose_group_takes_no_part_is_wrong_not_broken():
    assert judge_answer("none", "3", answer_pattern=r"#(\d+)|none") == accuracy.Verdict(correct=False)


@pytest.mark.parametrize("pattern", ["(", "[", r"#\d+$"])
def test_bad_patterns_are_refused_early(pattern):
    with pytest.raises(ValueError, match=r"rewards\.accuracy\.answer_pattern is"):
        AccuracyReward(AccuracyConfig(answer_pattern=pattern))


def group(gold: str | None, *texts: str) -> RolloutGroup:
    return RolloutGroup(
        Prompt("t:0", "q", "q", (1,), gold), tuple(Rollout((1,), (0.0,), (0,), "stop", text=t) for t in texts)
    )


def test_rewards_are_group_major_with_nan_where_no_gold_answer_is_known():
    reward = AccuracyReward(AccuracyConfig(answer_pattern=PATTERN))
    scores = reward([group("3", "#3", "#4"), group(None, "#3", "#4"), group("4", "#3", "#4")], [])
    assert reward.name == "accuracy"
    assert str(scores.dtype) == "torch.float32"
    assert scores[:2].tolist() == [1.0, 0.0]
    assert scores[2:4].isnan().all()
    assert scores[4:].tolist() == [0.0, 1.0]


def test_a_runaway_comparison_is_timed_out_counted_and_wrong(monkeypatch, caplog):
    monkeypatch.setattr(accuracy, "TIMEOUT_S", 1)
    reward = AccuracyReward(AccuracyConfig())
    scores = reward([group("3", r"\boxed{9^{9^{9^9}}}", r"\boxed{3}")], [])
    assert scores.tolist() == [0.0, 1.0]
    assert reward.failures == 1
    assert "1 answers could not be verified" in caplog.text


def test_verification_outside_the_main_thread_says_so():
    raised: list[BaseException] = []

    def verify() -> None:
        try:
            answer_is_correct("so 1/2", "0.5")
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=verify)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_many_unclosed_boxes_take_linear_time():
    assert accuracy.last_boxed(r"\boxed{" * 50_000) is None
    assert math.isnan(AccuracyReward(AccuracyConfig())._score("x", None))
