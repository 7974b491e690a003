"""Reading the raw sources: cleaning, mail, HTML, WordNet and ratings."""

import bz2
import io
import json
import tarfile
import tempfile
import unittest
from pathlib import Path

import context  # noqa: F401
import sources


class CleanTest(unittest.TestCase):
    def test_control_and_zero_width_characters_go(self):
        self.assertEqual(sources.clean("a\x00b\r\n\tc\u200bd\ufeff  e\u2028f"), "a b cd e f")

    def test_windows_quotes_in_latin_1_become_quotes(self):
        self.assertEqual(sources.clean("it\x92s \x93so\x94"), "it\u2019s \u201cso\u201d")

    def test_lone_surrogates_and_replacement_characters_go_so_that_it_encodes(self):
        self.assertEqual(sources.clean("a\ud800b\ufffdc").encode("utf-8"), b"abc")

    def test_letters_of_any_script_stay(self):
        self.assertEqual(sources.clean("Touche\u0301 \u5357\u4eac"), "Touch\u00e9 \u5357\u4eac")

    def test_the_key_ignores_case_and_spacing_only(self):
        self.assertEqual(sources.text_key("A  b"), sources.text_key("a B"))
        self.assertNotEqual(sources.text_key("good :)"), sources.text_key("good :("))
        self.assertNotEqual(sources.text_key("a", "b"), sources.text_key("a b"))


class MailTest(unittest.TestCase):
    def test_plain_mail_keeps_subject_and_body_and_no_other_header(self):
        subject, body = sources.parse_mail("From: x@y\nSubject: Hello\n there\nX-Spam: 1\n\nline one\nline two\n")
        self.assertEqual((subject, body), ("Hello there", "line one line two"))

    def test_encoded_subject_and_base64_body_are_decoded(self):
        raw = (
            "Subject: =?iso-8859-1?q?Caf=E9?=\nContent-Type: text/plain; charset=iso-8859-1\n"
            "Content-Transfer-Encoding: base64\n\nQ2Fm6Q==\n"
        )
        self.assertEqual(sources.parse_mail(raw), ("Caf\u00e9", "Caf\u00e9"))

    def test_html_is_used_only_where_there_is_no_plain_text(self):
        both = (
            "Subject: s\nContent-Type: multipart/alternative; boundary=b\n\n--b\nContent-Type: text/html\n\n<b>page</b>\n"
            "--b\nContent-Type: text/plain\n\nplain\n--b--\n"
        )
        self.assertEqual(sources.parse_mail(both)[1], "plain")
        page = "Subject: s\nContent-Type: text/html\n\n<style>p {}</style><p>Buy<br>now &amp; here</p><script>x()</script>"
        self.assertEqual(sources.parse_mail(page)[1], "Buy now & here")

    def test_attachments_and_unknown_character_sets_do_no_harm(self):
        raw = (
            "Subject: =?x-none?q?s?=\nContent-Type: multipart/mixed; boundary=b\n\n--b\n"
            "Content-Type: text/plain; charset=x-none\nContent-Transfer-Encoding: quoted-printable\n\ngr=FCn\n--b\n"
            "Content-Type: text/plain\nContent-Disposition: attachment; filename=a.txt\n\nsecret\n--b--\n"
        )
        self.assertEqual(sources.parse_mail(raw)[1], "gr\u00fcn")

    def test_a_thread_is_its_subject_without_marks_and_numbers(self):
        self.assertEqual(sources.mail_thread("Re: [ILUG] RE[2]: removing lilo 42"), "removing lilo")
        self.assertEqual(sources.mail_thread("removing LILO"), "removing lilo")

    def test_the_corpus_is_read_in_order_with_labels_from_its_folders(self):
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(Path(folder) / "spam-assassin.tgz", "w:gz") as archive:
                for group, number in (("spam-1", "2"), ("easy-ham-1", "1")):
                    record = {"id": number, "group": group, "text": f"Subject: Re: Topic {number}\n\nBody {number}"}
                    data = json.dumps(record).encode()
                    entry = tarfile.TarInfo(f"package/data/{group}/{number}.json")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
            rows = list(sources.spam(Path(folder)))
        self.assertEqual([row.label for row in rows], ["ham", "spam"])
        self.assertEqual(rows[0].texts, ("Re: Topic 1 Body 1",))
        self.assertEqual(rows[0].group, rows[1].group)


class RatingTest(unittest.TestCase):
    def test_three_classes_by_half_a_point_and_documents_as_groups(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "tweets.txt").write_bytes(b"1_1\t0.5\tgood &amp; kind\r\n1_2\t-0.5\tbad\r\n2_1\t0.49\tso\r\n")
            classes = list(sources.tweet_sentiment(Path(folder)))
            ratings = list(sources.tweet_rating(Path(folder)))
        self.assertEqual([row.label for row in classes], ["positive", "negative", "neutral"])
        self.assertEqual([row.label for row in ratings], ["0.5000", "-0.5000", "0.4900"])
        self.assertEqual(classes[0].texts, ("good & kind",))
        self.assertEqual([row.group for row in classes], ["1", "1", "2"])


class MovieTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        text = (
            "category,text,movie_name,has_plot_and_reviews\n"
            'fresh,"Good, indeed.",m1,True\nplot,"Mr. Bean goes to town. He meets a cow! The end.",m1,True\n'
        )
        (self.folder / "rotten_tomatoes.csv.bz2").write_bytes(bz2.compress(text.encode()))

    def test_polarity_takes_reviews_only(self):
        rows = list(sources.movie_polarity(self.folder))
        self.assertEqual([(row.texts[0], row.label, row.group) for row in rows], [("Good, indeed.", "fresh", "m1")])

    def test_plots_are_split_into_sentences_of_four_words_or_more(self):
        rows = list(sources.plot_vs_review(self.folder))
        self.assertEqual(
            [(row.texts[0], row.label) for row in rows],
            [("Good, indeed.", "review"), ("Mr. Bean goes to town.", "plot"), ("He meets a cow!", "plot")],
        )


WORDNET = """  1 a licence line
00000001 15 n 01 bank 0 000 | sloping land; "they sat on the bank of the river"
00000002 14 n 02 bank 1 depository 0 000 | a place for money; "he cashed a check at the bank"; "too short"
00000003 06 n 01 spoon 0 000 | a tool for soup; "eat it with a spoon please"
"""


class WordNetTest(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        for part in ("verb", "adj", "adv"):
            (self.folder / f"data.{part}").write_text("")
        (self.folder / "data.noun").write_text(WORDNET)

    def test_a_line_is_taken_apart(self):
        sense = sources.parse_sense('00000009 00 a 02 New_York(a) 0 big 0 001 \\ 1 n 0 | large; "a b"; "c d"  ', "adj")
        self.assertEqual(sense.lemmas, ("new york", "big"))
        self.assertEqual((sense.definition, sense.examples), ("large", ("a b", "c d")))

    def test_the_definition_alone_is_classed(self):
        rows = list(sources.supersense(self.folder))
        self.assertEqual(
            [(row.texts[0], row.label) for row in rows],
            [("sloping land", "location"), ("a place for money", "group"), ("a tool for soup", "artifact")],
        )
        self.assertEqual(len(set(sources.SUPERSENSES.values())), 26)

    def test_a_pair_is_an_example_with_its_own_and_with_another_sense(self):
        rows = list(sources.gloss_pair(self.folder))
        self.assertEqual(
            [(row.texts, row.label) for row in rows],
            [
                (("they sat on the bank of the river", "sloping land"), "match"),
                (("they sat on the bank of the river", "a place for money"), "other"),
                (("he cashed a check at the bank", "a place for money"), "match"),
                (("he cashed a check at the bank", "sloping land"), "other"),
            ],
        )
        self.assertEqual({row.group for row in rows}, {"bank"})


if __name__ == "__main__":
    unittest.main()
