"""Built-in English-like prose: a small seeded grammar, for background text where no books are at hand.

No name of a bAbI person and no number occurs in it, so that it never answers a question; rooms and things do occur.
"""

import random
import re

WORDS = {
    "name": "Agnes Albert Arthur Beatrice Clara Conrad Dorothy Edmund Eleanor Ezra Flora Gideon Harriet Hector Hugo "
    "Ingrid Jasper Leopold Lydia Margot Matthias Nora Oscar Philippa Quentin Rosalind Rufus Silas Theodora Ursula "
    "Victor Wilhelmina",
    "role": "baker captain carpenter clerk doctor farmer ferryman gardener governess innkeeper lawyer librarian "
    "merchant miller musician painter pilgrim printer sailor schoolmaster shepherd soldier surveyor tailor watchman "
    "weaver widow",
    "adjective": "ancient bitter brave bright broad careful cheerful clever cold crooked curious damp dark dusty "
    "empty faded faint famous foreign gentle golden grave heavy hollow honest humble idle lonely narrow patient pale "
    "quiet restless rusty severe shallow silent simple solemn strange stubborn tired uneasy vast weary worn young",
    "place": "attic bakery barn bathroom bedroom bridge cabin castle cellar chapel church courtyard cottage factory "
    "farm garden hallway harbour inn kitchen library lighthouse market meadow mill monastery museum office orchard "
    "palace parlour prison quarry school shop stable station theatre tower tunnel village vineyard workshop",
    "thing": "almanac apple barrel basket bell blanket book bottle box candle carriage chair clock coat compass "
    "curtain drum fiddle football key kettle ladder lamp lantern letter loaf map milk mirror newspaper painting pipe "
    "plough portrait ribbon ring rope saddle sail stone sword table telescope trunk umbrella wheel whistle window",
    "people": "brothers children cousins fishermen guests labourers neighbours officers pupils servants sisters "
    "strangers students travellers villagers visitors",
    "idea": "ambition beauty courage debt duty fate forgiveness fortune freedom glory grief happiness honour hope "
    "justice kindness law loyalty memory mercy money patience peace poverty pride reason silence time trade truth "
    "virtue war wisdom work youth",
    "time": "at_dawn before_breakfast after_dinner in_the_evening late_that_night on_the_following_day in_early_spring "
    "during_the_winter some_weeks_later one_rainy_afternoon toward_midnight all_that_summer every_Sunday "
    "not_long_afterwards in_those_years at_the_end_of_harvest",
    "manner": "awkwardly bravely calmly carelessly coldly eagerly faintly firmly gladly gravely hastily kindly loudly "
    "patiently politely proudly sadly secretly silently slowly softly solemnly suddenly thoughtfully warmly wearily",
    "did": "admired borrowed carried cleaned counted described discovered drew examined hid inspected mended "
    "mentioned noticed opened polished praised remembered repaired sold studied touched wrapped",
    "said": "announced argued believed confessed declared explained feared insisted knew maintained observed promised "
    "remarked repeated said supposed suspected thought whispered",
    "went": "climbed crept drove fled galloped hurried marched rode rushed sailed strolled walked wandered",
    "weather": "fog frost hail mist moonlight rain snow storm sunlight thunder wind",
    "was": "appeared became felt looked proved remained seemed was",
    "beyond": "above behind below beside beyond near under",
    "link": "although because while until whenever since",
}
RULES = {
    "sentence": (
        "<time> <who> <past>, <link> <clause>.",
        "<who> <past> <time>, and <clause>.",
        "<clause>, but <clause>.",
        "The <people> of the <place> <said> that <clause>.",
        "There was <a> <adjective> <thing> <beyond> the <place>, and <clause>.",
        "“It is only <a> <adjective> <thing>,” <said> <who> <manner>, “and <idea> is worth more than that.”",
        "<link> <clause>, <clause>.",
        "Nobody in the <place> had ever spoken of <idea> to <who> before <clause>.",
        "What <who> <said> about <idea> and <idea> was soon forgotten by the <people>.",
        "The <weather> came down over the <adjective> <place>, and the <people> <went> home <manner>.",
        "Is it not true that <idea> and <idea> are the <adjective> companions of every <role>?",
        "Of all the <people> in the <place>, only the <adjective> <role> <past> <time>.",
        "<who>, who had once been <a> <role>, <past> and <past>.",
    ),
    "clause": (
        "<who> <past>",
        "the <thing> <beyond> the <place> <was> <adjective>",
        "the <people> <went> <manner> toward the <place>",
        "the <weather> <was> <adjective> and the <place> <was> <adjective>",
        "<idea> <was> as <adjective> as <a> <thing> in the <weather>",
        "<who> <said> that <who> <did> the <thing>",
    ),
    "past": (
        "<manner> <did> the <adjective> <thing>",
        "<did> <a> <thing> and <a> <adjective> <thing>",
        "<went> past the <place> with the <people>",
        "<was> <adjective> in the <weather>",
        "<did> the <thing> of the <role> <manner>",
    ),
    "who": ("<name>", "<name>", "the <role>", "the <adjective> <role>", "<name> the <role>"),
    "a": ("a",),
}
_CHOICES = {kind: tuple(w.replace("_", " ") for w in words.split()) for kind, words in WORDS.items()} | RULES
_SLOT = re.compile(r"<(\w+)>")


def write(num_sentences: int, seed: int) -> list[str]:
    """Write `num_sentences` sentences, reproducible for a seed."""
    rng = random.Random(seed)
    return [_sentence(rng) for _ in range(num_sentences)]


def _sentence(rng: random.Random) -> str:
    def fill(slot: re.Match) -> str:
        return _SLOT.sub(fill, rng.choice(_CHOICES[slot[1]]))

    text = re.sub(r"\ba (?=[aeiou])", "an ", fill(_SLOT.match("<sentence>")))
    return text[0].upper() + text[1:]
