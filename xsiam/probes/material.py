"""Hand-written material of the bundled pair set: frames, word families, paraphrases, judgements.

Everything is grouped by split, and nothing is shared between splits: a frame, a word family or a
paraphrase group stands in exactly one of :data:`TRAIN`, :data:`VALIDATION` and :data:`TEST`.
:mod:`xsiam.probes.generate` combines frames with fillers of the same ``kind`` within one split, so
every filler of a kind has to make a natural sentence with every frame of that kind.

Scores are judgements of how much of the meaning two sentences share, on the scale of
:mod:`xsiam.probes.generate`. ``weight`` of a frame is the share of the sentence's meaning that its
slot decides: 1 where the filler is the main assertion, less where it is a detail of a longer one.

Slots: ``{x}`` and ``{y}`` take a filler; ``{a x}`` takes it with its indefinite article.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """A sentence with one slot ``{x}``."""

    id: str
    kind: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Family:
    """A word with its alternatives in the same slot, each with the score of a frame of weight 1."""

    kind: str
    base: str
    synonym: str
    synonym_score: float
    antonym: str | None
    antonym_score: float
    unrelated: str
    unrelated_score: float


@dataclass(frozen=True)
class Contrast:
    """Two fillers of one slot and the score of a frame of weight 1."""

    kind: str
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class RoleFrame:
    """A sentence with two roles, and where it exists the same statement in another voice.

    ``score`` is that of the sentence with its roles exchanged, ``restated_score`` that of the
    other voice with its roles kept. ``converse`` says that the restatement is in the converse
    relation ("taller", "shorter") instead.
    """

    id: str
    kind: str
    text: str
    score: float
    restated: str | None = None
    restated_score: float = 0.95
    converse: bool = False


@dataclass(frozen=True)
class RolePair:
    """Two fillers that can take either role."""

    kind: str
    first: str
    second: str


@dataclass(frozen=True)
class NegationFrame:
    """An affirmative and a negated frame for one predicate; ``marker`` names the negating word."""

    id: str
    kind: str
    affirmative: str
    negated: str
    marker: str
    score: float


@dataclass(frozen=True)
class Predicate:
    """A predicate for the negation frames of its kind."""

    kind: str
    text: str


@dataclass(frozen=True)
class NegatedPair:
    """A sentence and its negation, written out."""

    id: str
    affirmative: str
    negated: str
    marker: str
    score: float


@dataclass(frozen=True)
class Group:
    """Three related sentences; ``scores`` are those of the pairs (1, 2), (1, 3) and (2, 3).

    As a paraphrase group all three say the same, and ``field`` is the walk of life they are from.
    As a detail group each sentence says more than the one before.
    """

    id: str
    field: str
    sentences: tuple[str, str, str]
    scores: tuple[float, float, float]


@dataclass(frozen=True)
class Material:
    """All material of one split."""

    frames: tuple[Frame, ...]
    families: tuple[Family, ...]
    contrast_frames: dict[str, tuple[Frame, ...]]
    contrasts: dict[str, tuple[Contrast, ...]]
    role_frames: tuple[RoleFrame, ...]
    role_pairs: tuple[RolePair, ...]
    negation_frames: tuple[NegationFrame, ...]
    predicates: tuple[Predicate, ...]
    negated_pairs: tuple[NegatedPair, ...]
    paraphrases: tuple[Group, ...]
    details: tuple[Group, ...]
    unrelated_steps: tuple[int, ...]
    """Each paraphrase group is paired with those so many places further on, as unrelated."""


TRAIN = Material(
    frames=(
        Frame("neighbour_is", "person", "My new neighbour is {x}."),
        Frame(
            "village_said", "person", "Everyone in the village said the blacksmith was {x}.", 0.95
        ),
        Frame("married_man", "person", "She married {a x} man from the coast.", 0.85),
        Frame("after_match", "mood", "After the long match the players were {x}."),
        Frame("grandfather_looked", "mood", "Grandfather looked {x} when he came home.", 0.95),
        Frame("why_brother", "mood", "Why is your brother so {x} today?"),
        Frame("carried_box", "thing", "He carried {a x} box up the stairs.", 0.85),
        Frame("kitchen_table", "thing", "There is {a x} table in the kitchen.", 0.9),
        Frame("vase_market", "thing", "The vase that Maria found at the market was {x}.", 0.95),
        Frame("waiting_room", "place", "The waiting room was {x} when the inspectors came.", 0.95),
        Frame("lunch_hall", "place", "We had lunch in {a x} hall near the station.", 0.8),
        Frame("third_floor", "place", "The office on the third floor was {x}."),
        Frame("final_exam", "task", "The final exam was {x}."),
        Frame("assignment", "task", "Our class was given {a x} assignment on Friday.", 0.85),
        Frame("interview", "task", "Nobody had warned us that the interview would be {x}.", 0.9),
        Frame("canteen_soup", "food", "The soup in the canteen was {x}."),
        Frame("served_stew", "food", "He served us {a x} stew with bread.", 0.85),
        Frame("late_curry", "food", "Lunch was served late, and the curry was {x}.", 0.8),
        Frame("school_street", "road", "The street behind the school is {x}."),
        Frame("harbour_lane", "road", "{a x} lane leads down to the harbour.", 0.85),
        Frame("airport_bus", "transport", "The bus to the airport is {x}."),
        Frame("tram_to_work", "transport", "Most people here go to work on {a x} tram.", 0.85),
        Frame("lake_house", "deed", "The couple {x} a house near the lake."),
        Frame(
            "cousin_cabin",
            "deed",
            "Last summer my cousin {x} the cabin you see in the picture.",
            0.9,
        ),
        Frame("villagers_barn", "deed", "The villagers {x} the old barn in 1994.", 0.95),
        Frame("committee_proposal", "stance", "The committee {x} the proposal yesterday."),
        Frame("minister_plan", "stance", "In a short speech the minister {x} the plan.", 0.95),
        Frame(
            "teachers_timetable", "stance", "Several teachers {x} the new timetable at the meeting."
        ),
        Frame("concert_nine", "event", "The concert {x} at nine."),
        Frame(
            "ceremony", "event", "The ceremony in the old town {x} in the early afternoon.", 0.95
        ),
        Frame("price_bread", "trend", "The price of bread {x} last year."),
        Frame(
            "unemployment", "trend", "According to the report, unemployment {x} in spring.", 0.95
        ),
        Frame("visitors", "trend", "The number of visitors {x} after the bridge was opened.", 0.9),
        Frame("guests", "coming", "Our guests {x} before dinner."),
        Frame("electrician", "coming", "The electrician {x} at half past eight."),
        Frame("parents_snow", "coming", "Her parents {x} while it was still snowing.", 0.9),
        Frame("waiting_outside", "worker", "The {x} was waiting outside the building."),
        Frame("recognised", "worker", "Two people on the bus recognised the {x}.", 0.9),
        Frame("since_monday", "worker", "Nobody had seen the {x} since Monday."),
        Frame("into_garage", "object", "They carried the {x} into the garage."),
        Frame("how_much", "object", "How much did you pay for the {x}?"),
        Frame("surprised", "outcome", "The {x} surprised everybody in the country."),
        Frame("heard_radio", "outcome", "I heard about the {x} on the radio this morning."),
        Frame("two_men", "relation", "The two men have been {x} for twenty years."),
        Frame("father_uncle", "relation", "My father and your uncle were once {x}."),
        Frame("visits_museum", "frequency_adverb", "My brother {x} visits the museum."),
        Frame("swim_before_work", "frequency_adverb", "They {x} go swimming before work.", 0.95),
        Frame("opened_letter", "manner", "She {x} opened the letter.", 0.9),
        Frame("cleared_tables", "manner", "The waiter {x} cleared the tables near the door.", 0.8),
    ),
    families=(
        Family("person", "brave", "courageous", 0.93, "cowardly", 0.22, "talkative", 0.18),
        Family("person", "clever", "intelligent", 0.92, "stupid", 0.2, "shy", 0.2),
        Family("person", "polite", "courteous", 0.94, "rude", 0.22, "athletic", 0.16),
        Family("person", "lazy", "idle", 0.88, "hardworking", 0.22, "musical", 0.16),
        Family("person", "generous", "big-hearted", 0.88, "stingy", 0.23, "artistic", 0.18),
        Family("mood", "happy", "cheerful", 0.9, "sad", 0.22, "thirsty", 0.16),
        Family("mood", "calm", "relaxed", 0.9, "nervous", 0.24, "sunburnt", 0.14),
        Family("mood", "tired", "weary", 0.94, "energetic", 0.24, "hungry", 0.22),
        Family("thing", "heavy", "hefty", 0.92, "light", 0.24, "yellow", 0.16),
        Family("thing", "big", "large", 0.95, "small", 0.25, "square", 0.18),
        Family("thing", "new", "brand-new", 0.91, "old", 0.25, "green", 0.16),
        Family("thing", "clean", "spotless", 0.89, "dirty", 0.22, "wooden", 0.15),
        Family("thing", "expensive", "costly", 0.94, "cheap", 0.23, "hexagonal", 0.16),
        Family("place", "quiet", "peaceful", 0.89, "noisy", 0.22, "draughty", 0.17),
        Family("place", "crowded", "packed", 0.92, "empty", 0.2, "heated", 0.15),
        Family("place", "dark", "dim", 0.9, "bright", 0.22, "carpeted", 0.16),
        Family("task", "difficult", "tough", 0.92, "easy", 0.22, "practical", 0.18),
        Family("task", "long", "lengthy", 0.95, "short", 0.24, "digital", 0.15),
        Family("task", "boring", "dull", 0.93, "exciting", 0.21, "compulsory", 0.16),
        Family("food", "hot", "steaming", 0.87, "cold", 0.23, "salty", 0.2),
        Family("food", "delicious", "tasty", 0.94, "disgusting", 0.2, "homemade", 0.2),
        Family("food", "spicy", "peppery", 0.91, "bland", 0.24, "vegetarian", 0.17),
        Family("road", "wide", "broad", 0.95, "narrow", 0.22, "cobbled", 0.16),
        Family("road", "steep", "sloping", 0.86, "flat", 0.22, "muddy", 0.17),
        Family("transport", "fast", "speedy", 0.93, "slow", 0.22, "air-conditioned", 0.16),
        Family("transport", "modern", "up-to-date", 0.9, "outdated", 0.22, "blue", 0.14),
        Family("deed", "bought", "purchased", 0.95, "sold", 0.27, "painted", 0.2),
        Family("deed", "built", "constructed", 0.95, "demolished", 0.22, "photographed", 0.17),
        Family("deed", "repaired", "fixed up", 0.92, "damaged", 0.23, "inspected", 0.2),
        Family("stance", "approved", "endorsed", 0.92, "rejected", 0.21, "mentioned", 0.3),
        Family("stance", "praised", "applauded", 0.91, "criticised", 0.21, "summarised", 0.28),
        Family("stance", "supported", "backed", 0.95, "opposed", 0.21, "explained", 0.3),
        Family("event", "started", "began", 0.95, "ended", 0.28, "was filmed", 0.2),
        Family("trend", "rose", "increased", 0.95, "fell", 0.23, "was debated", 0.22),
        Family("coming", "arrived", "turned up", 0.91, "left", 0.26, "phoned", 0.24),
        Family("worker", "doctor", "physician", 0.95, None, 0.0, "plumber", 0.22),
        Family("worker", "lawyer", "attorney", 0.95, None, 0.0, "gardener", 0.2),
        Family("worker", "thief", "robber", 0.9, None, 0.0, "violinist", 0.16),
        Family("worker", "boss", "manager", 0.92, "employee", 0.32, "tailor", 0.2),
        Family("object", "couch", "sofa", 0.95, None, 0.0, "ladder", 0.18),
        Family("object", "bicycle", "bike", 0.95, None, 0.0, "mattress", 0.17),
        Family("object", "rug", "carpet", 0.92, None, 0.0, "microscope", 0.14),
        Family("outcome", "victory", "triumph", 0.93, "defeat", 0.23, "wedding", 0.15),
        Family("relation", "friends", "pals", 0.93, "enemies", 0.2, "carpenters", 0.15),
        Family("frequency_adverb", "often", "frequently", 0.95, "rarely", 0.24, "secretly", 0.28),
        Family("manner", "quickly", "rapidly", 0.95, "slowly", 0.28, "proudly", 0.3),
        Family("manner", "carefully", "cautiously", 0.93, "carelessly", 0.26, "happily", 0.3),
    ),
    contrast_frames={
        "quantity": (
            Frame("children_park", "number", "{x} children were playing in the park."),
            Frame("bottles_table", "number", "There are {x} bottles on the kitchen table."),
            Frame("colleagues_party", "number", "She invited {x} colleagues to the party.", 0.95),
            Frame(
                "museum_rooms", "number", "The museum has {x} rooms with medieval paintings.", 0.9
            ),
            Frame("students_passed", "share", "{x} of the students passed the test."),
            Frame("tickets_sold", "share", "{x} of the tickets were sold within a week.", 0.95),
            Frame("shops_closed", "share", "By evening, {x} of the shops had closed.", 0.95),
            Frame("journey_takes", "duration", "The journey takes {x}."),
            Frame(
                "gate_opened",
                "duration",
                "They had been waiting for {x} when the gate opened.",
                0.9,
            ),
            Frame(
                "patient_home", "duration", "After {x}, the patient was allowed to go home.", 0.9
            ),
            Frame("to_the_gym", "rate", "He goes to the gym {x}."),
            Frame("bins_emptied", "rate", "The bins in our street are emptied {x}."),
            Frame("choir_meets", "rate", "Our choir meets {x} in the school hall.", 0.9),
            Frame("milk_dough", "portion", "Add {x} milk to the dough.", 0.95),
            Frame("drank_milk", "portion", "Before going to bed he drank {x} milk.", 0.9),
            Frame("ticket_costs", "price", "The ticket costs {x}."),
            Frame("old_coat", "price", "I found {x} in the pocket of my old coat.", 0.9),
        ),
        "specificity": (
            Frame("garden_wall", "animal", "{a x} was sitting on the garden wall."),
            Frame(
                "through_fence",
                "animal",
                "The children were watching {a x} through the fence.",
                0.95,
            ),
            Frame("near_mill", "animal", "On our walk we saw {a x} near the old mill.", 0.95),
            Frame("buy_tomorrow", "groceries", "We need to buy some {x} for tomorrow."),
            Frame("fond_of", "groceries", "My sister is very fond of {x}."),
            Frame("all_guests", "groceries", "They served {x} to all the guests.", 0.95),
            Frame("rescue_team", "craft", "The rescue team arrived in {a x}."),
            Frame("storm_damage", "craft", "{a x} was badly damaged in the storm."),
            Frame("grandfather_was", "profession", "Her grandfather was {a x}."),
            Frame("prize_norway", "profession", "The prize was given to {a x} from Norway.", 0.95),
            Frame("along_river", "motion", "The tourists {x} along the river."),
            Frame(
                "before_breakfast", "motion", "Before breakfast we {x} to the next village.", 0.95
            ),
        ),
    },
    contrasts={
        "quantity": (
            Contrast("number", "three", "four", 0.58),
            Contrast("number", "two", "five", 0.5),
            Contrast("number", "three", "ten", 0.46),
            Contrast("number", "two", "twenty", 0.42),
            Contrast("number", "many", "only a few", 0.4),
            Contrast("share", "all", "half", 0.5),
            Contrast("share", "most", "some", 0.52),
            Contrast("share", "nearly all", "a third", 0.42),
            Contrast("duration", "an hour", "an hour and a half", 0.58),
            Contrast("duration", "ten minutes", "two hours", 0.44),
            Contrast("duration", "a week", "a year", 0.4),
            Contrast("rate", "once a week", "twice a week", 0.57),
            Contrast("rate", "every day", "once a month", 0.43),
            Contrast("portion", "a glass of", "a bottle of", 0.52),
            Contrast("portion", "a spoonful of", "a cup of", 0.48),
            Contrast("portion", "half a litre of", "a litre of", 0.54),
            Contrast("price", "fifty euros", "forty euros", 0.57),
            Contrast("price", "five euros", "five hundred euros", 0.4),
        ),
        "specificity": (
            Contrast("animal", "kitten", "cat", 0.78),
            Contrast("animal", "sparrow", "bird", 0.75),
            Contrast("animal", "squirrel", "animal", 0.66),
            Contrast("groceries", "carrots", "vegetables", 0.7),
            Contrast("groceries", "strawberries", "fruit", 0.7),
            Contrast("groceries", "cheddar", "cheese", 0.78),
            Contrast("groceries", "spaghetti", "pasta", 0.78),
            Contrast("groceries", "salmon", "fish", 0.75),
            Contrast("craft", "van", "vehicle", 0.7),
            Contrast("craft", "helicopter", "aircraft", 0.74),
            Contrast("craft", "sailing boat", "boat", 0.78),
            Contrast("profession", "surgeon", "medical specialist", 0.76),
            Contrast("profession", "chemist", "scientist", 0.74),
            Contrast("profession", "poet", "writer", 0.76),
            Contrast("motion", "strolled", "walked", 0.8),
            Contrast("motion", "cycled", "travelled", 0.66),
        ),
    },
    role_frames=(
        RoleFrame(
            "thanked", "people", "The {x} thanked the {y}.", 0.5, "The {y} was thanked by the {x}."
        ),
        RoleFrame(
            "followed",
            "people",
            "The {x} followed the {y} into the station.",
            0.46,
            "The {y} was followed into the station by the {x}.",
        ),
        RoleFrame(
            "called", "people", "Late at night the {x} called the {y} to ask for help.", 0.52
        ),
        RoleFrame(
            "gave_flowers",
            "people",
            "The {x} gave the {y} a bunch of flowers.",
            0.5,
            "The {y} was given a bunch of flowers by the {x}.",
        ),
        RoleFrame(
            "taller",
            "people",
            "The {x} is taller than the {y}.",
            0.4,
            "The {y} is shorter than the {x}.",
            0.95,
            converse=True,
        ),
        RoleFrame(
            "betrayed",
            "people",
            "It was the {x} who had betrayed the {y}.",
            0.42,
            "It was the {y} who had been betrayed by the {x}.",
            0.92,
        ),
        RoleFrame(
            "chased",
            "creatures",
            "The {x} chased the {y} across the field.",
            0.48,
            "The {y} was chased across the field by the {x}.",
        ),
        RoleFrame(
            "bit", "creatures", "The {x} bit the {y}.", 0.45, "The {y} was bitten by the {x}.", 0.96
        ),
        RoleFrame(
            "left_of",
            "furniture",
            "The {x} is to the left of the {y}.",
            0.46,
            "The {y} is to the right of the {x}.",
            0.94,
            converse=True,
        ),
        RoleFrame(
            "behind",
            "furniture",
            "In the photo, the {x} is behind the {y}.",
            0.48,
            "In the photo, the {y} is in front of the {x}.",
            0.94,
            converse=True,
        ),
        RoleFrame("fell_onto", "furniture", "During the move, the {x} fell onto the {y}.", 0.54),
    ),
    role_pairs=(
        RolePair("people", "nurse", "soldier"),
        RolePair("people", "teacher", "pupil"),
        RolePair("people", "farmer", "banker"),
        RolePair("creatures", "dog", "goat"),
        RolePair("creatures", "fox", "goose"),
        RolePair("creatures", "monkey", "donkey"),
        RolePair("furniture", "lamp", "clock"),
        RolePair("furniture", "bookcase", "armchair"),
    ),
    negation_frames=(
        NegationFrame(
            "old_man", "doing", "The old man is {x}.", "The old man is not {x}.", "not", 0.28
        ),
        NegationFrame(
            "sister_now", "doing", "My sister is {x} now.", "My sister isn't {x} now.", "n't", 0.28
        ),
        NegationFrame(
            "two_boys",
            "doing",
            "The two boys were {x} when we came in.",
            "The two boys were not {x} when we came in.",
            "not",
            0.32,
        ),
        NegationFrame(
            "someone",
            "doing",
            "Someone is {x} next door.",
            "No one is {x} next door.",
            "no one",
            0.26,
        ),
        NegationFrame(
            "seen_him", "doing", "I have seen him {x}.", "I have never seen him {x}.", "never", 0.27
        ),
        NegationFrame(
            "decided", "plan", "They decided to {x}.", "They decided not to {x}.", "not", 0.25
        ),
        NegationFrame(
            "next_year",
            "plan",
            "Peter will {x} next year.",
            "Peter will not {x} next year.",
            "not",
            0.27,
        ),
        NegationFrame(
            "promised",
            "plan",
            "Years ago she promised her husband to {x}.",
            "Years ago she promised her husband never to {x}.",
            "never",
            0.27,
        ),
        NegationFrame(
            "why_want",
            "plan",
            "Why do your parents want to {x}?",
            "Why don't your parents want to {x}?",
            "n't",
            0.3,
        ),
        NegationFrame(
            "couple_plans",
            "plan",
            "The young couple have plans to {x}.",
            "The young couple have no plans to {x}.",
            "no",
            0.24,
        ),
    ),
    predicates=(
        Predicate("doing", "playing chess"),
        Predicate("doing", "reading a newspaper"),
        Predicate("doing", "listening to music"),
        Predicate("doing", "cooking dinner"),
        Predicate("doing", "repairing a bicycle"),
        Predicate("plan", "sell the house"),
        Predicate("plan", "move to Canada"),
        Predicate("plan", "learn Russian"),
        Predicate("plan", "open a restaurant"),
    ),
    negated_pairs=(
        NegatedPair(
            "train_left", "The train has already left.", "The train has not left yet.", "not", 0.22
        ),
        NegatedPair(
            "coffee_milk",
            "He drinks coffee with milk.",
            "He drinks coffee without milk.",
            "without",
            0.4,
        ),
        NegatedPair("lights_on", "The lights are on.", "The lights are not on.", "not", 0.24),
        NegatedPair(
            "somebody_knows",
            "Somebody knows where the key is.",
            "Nobody knows where the key is.",
            "nobody",
            0.24,
        ),
        NegatedPair(
            "bread_cupboard",
            "There is some bread in the cupboard.",
            "There is no bread in the cupboard.",
            "no",
            0.25,
        ),
        NegatedPair(
            "heard_anything",
            "We heard something in the cellar.",
            "We heard nothing in the cellar.",
            "nothing",
            0.24,
        ),
        NegatedPair("can_drive", "My mother can drive.", "My mother can't drive.", "n't", 0.24),
        NegatedPair(
            "dogs_allowed",
            "Dogs are allowed on this beach during the summer months.",
            "Dogs are not allowed on this beach during the summer months.",
            "not",
            0.26,
        ),
        NegatedPair(
            "both_keys",
            "Both of the keys fit the lock.",
            "Neither of the keys fits the lock.",
            "neither",
            0.24,
        ),
        NegatedPair(
            "found_reason",
            "The engineers found a reason for the delay.",
            "The engineers found no reason for the delay.",
            "no",
            0.28,
        ),
        NegatedPair(
            "game_rain",
            "The game was cancelled when it started to rain.",
            "The game wasn't cancelled when it started to rain.",
            "n't",
            0.25,
        ),
        NegatedPair(
            "place_to_sit",
            "There was somewhere to sit in the crowded waiting area.",
            "There was nowhere to sit in the crowded waiting area.",
            "nowhere",
            0.25,
        ),
        NegatedPair(
            "thinks_true",
            "The judge believes that the story is true.",
            "The judge does not believe that the story is true.",
            "not",
            0.26,
        ),
        NegatedPair(
            "saying_goodbye",
            "After saying goodbye, she left the room.",
            "Without saying goodbye, she left the room.",
            "without",
            0.4,
        ),
        NegatedPair(
            "factory_use",
            "The old factory is still in use.",
            "The old factory is no longer in use.",
            "no longer",
            0.24,
        ),
    ),
    paraphrases=(
        Group(
            "dinner_ready",
            "food",
            (
                "Dinner is ready.",
                "The evening meal is on the table.",
                "You can come and eat your dinner now.",
            ),
            (0.93, 0.92, 0.9),
        ),
        Group(
            "rain_match",
            "sport",
            (
                "The match was called off because of heavy rain.",
                "Heavy rain forced the organisers to cancel the match.",
                "It was raining so hard that the match had to be abandoned.",
            ),
            (0.98, 0.92, 0.92),
        ),
        Group(
            "quit_job",
            "work",
            (
                "She gave up her job at the bank.",
                "She resigned from her position at the bank.",
                "She quit working for the bank.",
            ),
            (0.97, 0.97, 0.96),
        ),
        Group(
            "snow_roads",
            "travel",
            (
                "Snow has made many roads impassable.",
                "Because of the snow, a lot of roads cannot be used.",
                "Many roads are blocked by snow.",
            ),
            (0.97, 0.96, 0.95),
        ),
        Group(
            "headache",
            "health",
            (
                "My head hurts.",
                "I have a headache.",
                "I am suffering from a pain in my head.",
            ),
            (0.98, 0.96, 0.96),
        ),
        Group(
            "violin_years",
            "music",
            (
                "He has been playing the violin since he was six.",
                "He took up the violin at the age of six and still plays it.",
                "Ever since his sixth birthday he has played the violin.",
            ),
            (0.97, 0.97, 0.95),
        ),
        Group(
            "loan_house",
            "money",
            (
                "They borrowed money from the bank to pay for their house.",
                "The bank lent them the money for their house.",
                "They financed their home with a bank loan.",
            ),
            (0.97, 0.96, 0.95),
        ),
        Group(
            "cat_missing",
            "animals",
            (
                "Our cat has been missing for three days.",
                "We have not seen our cat for three days.",
                "It is three days since our cat disappeared.",
            ),
            (0.95, 0.98, 0.94),
        ),
        Group(
            "bridge_closed",
            "travel",
            (
                "The bridge is closed to traffic until Monday.",
                "No cars may cross the bridge before Monday.",
                "Until Monday the bridge will stay shut for all vehicles.",
            ),
            (0.92, 0.97, 0.92),
        ),
        Group(
            "phone_battery",
            "technology",
            (
                "My phone has run out of battery.",
                "The battery of my phone is flat.",
                "My phone needs charging because its battery is dead.",
            ),
            (0.98, 0.94, 0.94),
        ),
        Group(
            "homework",
            "school",
            (
                "The pupils have to hand in their homework by Wednesday.",
                "Wednesday is the deadline for the pupils' homework.",
                "All homework must be given to the teacher no later than Wednesday.",
            ),
            (0.97, 0.93, 0.92),
        ),
        Group(
            "twins_alike",
            "family",
            (
                "The twins look exactly the same.",
                "You cannot tell the twins apart.",
                "There is no visible difference between the twins.",
            ),
            (0.94, 0.96, 0.94),
        ),
        Group(
            "vaccine",
            "science",
            (
                "Researchers have developed a vaccine against the disease.",
                "A vaccine that protects against the disease has been developed by researchers.",
                "Scientists have come up with a vaccine for the illness.",
            ),
            (0.97, 0.95, 0.93),
        ),
        Group(
            "guilty",
            "law",
            (
                "The jury found the driver guilty.",
                "The driver was convicted by the jury.",
                "In the eyes of the jury, the driver had committed the crime.",
            ),
            (0.97, 0.9, 0.9),
        ),
        Group(
            "roof_leaks",
            "home",
            (
                "Water is coming in through the roof.",
                "The roof leaks.",
                "There is a leak in the roof, and water is getting into the house.",
            ),
            (0.94, 0.95, 0.93),
        ),
        Group(
            "leaves_fall",
            "nature",
            (
                "In autumn the trees lose their leaves.",
                "The leaves fall from the trees in autumn.",
                "When autumn comes, the trees shed their leaves.",
            ),
            (0.98, 0.98, 0.97),
        ),
        Group(
            "cake_recipe",
            "food",
            (
                "To bake this cake you need four eggs and a little flour.",
                "This cake is made with four eggs and a little flour.",
                "Four eggs and a little flour are what you need for this cake.",
            ),
            (0.95, 0.97, 0.95),
        ),
        Group(
            "marathon",
            "sport",
            (
                "A runner from Kenya won the marathon.",
                "The winner of the marathon was a Kenyan runner.",
                "The marathon was won by a Kenyan.",
            ),
            (0.99, 0.96, 0.96),
        ),
        Group(
            "strike",
            "work",
            (
                "The workers went on strike for higher wages.",
                "Demanding better pay, the workers stopped working.",
                "The employees downed tools because they wanted more money.",
            ),
            (0.96, 0.94, 0.94),
        ),
        Group(
            "lost_passport",
            "travel",
            (
                "I cannot find my passport anywhere.",
                "My passport seems to be lost.",
                "I have looked everywhere for my passport without success.",
            ),
            (0.93, 0.96, 0.9),
        ),
        Group(
            "broken_leg",
            "health",
            (
                "While skiing, he broke his leg.",
                "He fractured his leg in a skiing accident.",
                "His leg got broken when he was skiing.",
            ),
            (0.96, 0.98, 0.95),
        ),
        Group(
            "remind",
            "family",
            (
                "You remind me of my grandmother.",
                "When I look at you, I have to think of my grandmother.",
                "Seeing you makes me think of my grandmother.",
            ),
            (0.94, 0.95, 0.98),
        ),
        Group(
            "internet_slow",
            "technology",
            (
                "The internet connection in this hotel is terribly slow.",
                "It takes ages to load a web page in this hotel.",
                "This hotel's internet is anything but fast.",
            ),
            (0.91, 0.94, 0.9),
        ),
        Group(
            "whale",
            "animals",
            (
                "Whales are mammals, although they live in the sea.",
                "Despite living in the sea, whales are mammals.",
                "The whale is a mammal that lives in the sea.",
            ),
            (0.99, 0.94, 0.94),
        ),
    ),
    details=(
        Group(
            "man_running",
            "",
            (
                "A man is running.",
                "A man is running along the beach.",
                "A man with a red cap is running along the beach at sunrise.",
            ),
            (0.74, 0.62, 0.78),
        ),
        Group(
            "girl_draws",
            "",
            (
                "A girl is drawing.",
                "A girl is drawing a horse.",
                "A girl is drawing a white horse on the pavement.",
            ),
            (0.76, 0.66, 0.78),
        ),
        Group(
            "burglary",
            "",
            (
                "The police arrested two men.",
                "The police arrested two men after a burglary.",
                "The police arrested two young men after a burglary in a jewellery shop.",
            ),
            (0.76, 0.66, 0.79),
        ),
        Group(
            "museum_opened",
            "",
            (
                "A museum has opened.",
                "A museum of local history has opened.",
                "A museum of local history has opened in the former railway station.",
            ),
            (0.74, 0.63, 0.78),
        ),
        Group(
            "plane_landed",
            "",
            (
                "The plane landed.",
                "The plane landed safely in Lisbon.",
                "Despite a broken engine, the plane landed safely in Lisbon.",
            ),
            (0.74, 0.62, 0.74),
        ),
        Group(
            "uncle_sings",
            "",
            (
                "My uncle sings.",
                "My uncle sings in a choir.",
                "On Tuesdays my uncle sings in a choir for retired miners.",
            ),
            (0.75, 0.62, 0.76),
        ),
        Group(
            "fire",
            "",
            (
                "There was a fire last night.",
                "There was a fire in a bakery last night.",
                "There was a fire in a bakery last night, and three people were injured.",
            ),
            (0.76, 0.62, 0.74),
        ),
        Group(
            "book_read",
            "",
            (
                "Julia has read the book.",
                "Julia has read the book twice.",
                "Julia has read the book about the polar expedition twice.",
            ),
            (0.78, 0.68, 0.8),
        ),
        Group(
            "sheep_grazing",
            "",
            (
                "Some sheep are grazing.",
                "Some sheep are grazing on a hill.",
                "Some sheep are grazing peacefully on a hill above the village.",
            ),
            (0.77, 0.69, 0.8),
        ),
        Group(
            "tea_made",
            "",
            (
                "He made tea.",
                "He made peppermint tea for everyone.",
                "He made peppermint tea for everyone while we were putting up the tents.",
            ),
            (0.74, 0.62, 0.76),
        ),
    ),
    unrelated_steps=(1, 5, 8),
)

VALIDATION = Material(
    frames=(
        Frame("painter_upstairs", "person", "The painter who lived upstairs was {x}."),
        Frame("hired_solicitor", "person", "The family hired {a x} solicitor.", 0.85),
        Frame("coach_seemed", "mood", "During the interview the coach seemed {x}."),
        Frame("two_passengers", "mood", "Two of the passengers were {x}.", 0.95),
        Frame(
            "doorstep_box", "thing", "Somebody had left {a x} cardboard box on the doorstep.", 0.8
        ),
        Frame("borrowed_tent", "thing", "The tent that we borrowed was {x}."),
        Frame("hotel_bathroom", "place", "The bathroom of the hotel was {x}."),
        Frame("studio_bakery", "place", "They rented {a x} studio above the bakery.", 0.85),
        Frame("job_in_march", "task", "The job she took in March is {x}."),
        Frame("project_abroad", "task", "He was offered {a x} project abroad.", 0.9),
        Frame("fair_lemonade", "food", "The lemonade at the fair was {x}."),
        Frame("after_meal", "food", "After the meal we were given {a x} drink.", 0.85),
        Frame("ring_forest", "deed", "The hikers {x} a silver ring in the forest."),
        Frame("reporters_actress", "stance", "The young reporters {x} the actress."),
        Frame("crisis_company", "trend", "The company {x} after the crisis."),
        Frame("wrap_paper", "object", "Please wrap the {x} in paper before you leave.", 0.9),
        Frame("met_zoo", "spot", "We met at the {x} of the zoo.", 0.95),
        Frame(
            "caretaker_noise", "frequency_adverb", "The caretaker {x} complains about the noise."
        ),
    ),
    families=(
        Family("person", "honest", "truthful", 0.92, "deceitful", 0.21, "bilingual", 0.16),
        Family("person", "famous", "well-known", 0.95, "obscure", 0.23, "elderly", 0.19),
        Family("mood", "angry", "furious", 0.88, "pleased", 0.23, "sleepy", 0.18),
        Family("thing", "strong", "sturdy", 0.93, "flimsy", 0.23, "purple", 0.15),
        Family("thing", "wet", "soaked", 0.88, "dry", 0.22, "round", 0.15),
        Family("place", "spacious", "roomy", 0.95, "cramped", 0.21, "tiled", 0.16),
        Family("task", "simple", "straightforward", 0.93, "complicated", 0.22, "unpaid", 0.16),
        Family("food", "sweet", "sugary", 0.91, "bitter", 0.24, "frozen", 0.19),
        Family("deed", "found", "discovered", 0.94, "lost", 0.24, "sketched", 0.2),
        Family("stance", "admired", "looked up to", 0.92, "despised", 0.2, "interviewed", 0.25),
        Family("trend", "grew", "expanded", 0.93, "shrank", 0.22, "relocated", 0.25),
        Family("object", "gift", "present", 0.95, None, 0.0, "teapot", 0.2),
        Family("spot", "entrance", "gate", 0.87, "exit", 0.33, "aquarium", 0.3),
        Family("frequency_adverb", "always", "constantly", 0.92, "seldom", 0.24, "loudly", 0.32),
    ),
    contrast_frames={
        "quantity": (
            Frame("soldiers_bridge", "number", "{x} soldiers were guarding the bridge."),
            Frame("geese", "number", "A flock of {x} geese flew over the house.", 0.95),
            Frame("floors", "number", "The tower that they are building will have {x} floors."),
            Frame("harvest", "share", "{x} of the harvest was lost.", 0.95),
            Frame("land_church", "share", "The church owns {x} of the land."),
            Frame("hospital_stay", "duration", "She stayed in hospital for {x}."),
            Frame(
                "lift_repairs",
                "duration",
                "Because of the repairs, the lift was out of use for {x}.",
            ),
        ),
        "specificity": (
            Frame("behind_stables", "animal", "{a x} was resting behind the stables."),
            Frame("best_friend", "profession", "My best friend is {a x}."),
            Frame("documentary", "profession", "The film is about {a x} from Portugal.", 0.95),
            Frame("pass_me", "tool", "Could you pass me the {x}, please?"),
        ),
    },
    contrasts={
        "quantity": (
            Contrast("number", "six", "nine", 0.56),
            Contrast("number", "eleven", "ninety", 0.41),
            Contrast("share", "a quarter", "the whole", 0.45),
            Contrast("duration", "a month", "several months", 0.53),
        ),
        "specificity": (
            Contrast("animal", "tortoise", "reptile", 0.73),
            Contrast("animal", "foal", "horse", 0.77),
            Contrast("profession", "goalkeeper", "footballer", 0.76),
            Contrast("profession", "novelist", "author", 0.78),
            Contrast("tool", "hammer", "tool", 0.7),
        ),
    },
    role_frames=(
        RoleFrame(
            "insulted",
            "people",
            "The {x} insulted the {y}.",
            0.46,
            "The {y} was insulted by the {x}.",
        ),
        RoleFrame(
            "lent_book",
            "people",
            "Last week the {x} lent the {y} a book about gardening.",
            0.5,
            "Last week the {y} was lent a book about gardening by the {x}.",
        ),
        RoleFrame(
            "earns_more",
            "people",
            "The {x} earns more than the {y}.",
            0.4,
            "The {y} earns less than the {x}.",
            0.95,
            converse=True,
        ),
    ),
    role_pairs=(
        RolePair("people", "judge", "cook"),
        RolePair("people", "mechanic", "librarian"),
    ),
    negation_frames=(
        NegationFrame(
            "tourists_were",
            "doing",
            "The tourists were {x}.",
            "The tourists weren't {x}.",
            "n't",
            0.28,
        ),
        NegationFrame(
            "us_enjoyed",
            "doing",
            "All of us enjoyed {x}.",
            "None of us enjoyed {x}.",
            "none",
            0.22,
        ),
        NegationFrame(
            "dentist_advised",
            "plan",
            "The dentist advised her to {x}.",
            "The dentist advised her not to {x}.",
            "not",
            0.26,
        ),
        NegationFrame("you_may", "plan", "You may {x}.", "You may not {x}.", "not", 0.25),
    ),
    predicates=(
        Predicate("doing", "dancing in the street"),
        Predicate("doing", "swimming in the cold river"),
        Predicate("plan", "eat nuts"),
        Predicate("plan", "chew gum"),
    ),
    negated_pairs=(
        NegatedPair(
            "shop_open",
            "The pharmacy is open on Sundays.",
            "The pharmacy is not open on Sundays.",
            "not",
            0.25,
        ),
        NegatedPair(
            "witness_remembers",
            "The witness remembers the colour of the car.",
            "The witness doesn't remember the colour of the car.",
            "n't",
            0.27,
        ),
        NegatedPair(
            "any_apples",
            "There are some apples left.",
            "There are no apples left.",
            "no",
            0.24,
        ),
        NegatedPair(
            "with_hat",
            "He never goes out without a hat.",
            "He goes out without a hat.",
            "never",
            0.3,
        ),
    ),
    paraphrases=(
        Group(
            "moved_in",
            "home",
            (
                "A young family has moved into the flat below us.",
                "The flat below ours is now occupied by a young family.",
                "We have got new neighbours downstairs, a young family.",
            ),
            (0.95, 0.93, 0.91),
        ),
        Group(
            "price_petrol",
            "money",
            (
                "Petrol has become more expensive.",
                "The price of petrol has gone up.",
                "You have to pay more for petrol than before.",
            ),
            (0.99, 0.96, 0.96),
        ),
        Group(
            "storm_tree",
            "weather",
            (
                "The storm blew down an old oak.",
                "An old oak was brought down by the storm.",
                "In the storm, an old oak fell over.",
            ),
            (0.98, 0.95, 0.95),
        ),
        Group(
            "late_train",
            "travel",
            (
                "Our train was two hours late.",
                "We reached our destination two hours late because of a delayed train.",
                "The train that we took had a delay of two hours.",
            ),
            (0.91, 0.97, 0.9),
        ),
        Group(
            "afraid_dark",
            "family",
            (
                "The little boy is afraid of the dark.",
                "Darkness frightens the little boy.",
                "The little boy gets scared when it is dark.",
            ),
            (0.97, 0.97, 0.96),
        ),
    ),
    details=(
        Group(
            "woman_waits",
            "",
            (
                "A woman is waiting.",
                "A woman is waiting at the bus stop.",
                "A woman with two heavy bags is waiting at the bus stop.",
            ),
            (0.75, 0.65, 0.8),
        ),
        Group(
            "club_founded",
            "",
            (
                "They founded a club.",
                "They founded a club for chess players.",
                "In the winter of 1968 they founded a club for chess players.",
            ),
            (0.75, 0.65, 0.79),
        ),
        Group(
            "bird_nest",
            "",
            (
                "The birds have built a nest.",
                "The birds have built a nest under the roof.",
                "The birds have built a nest of straw and feathers under the roof.",
            ),
            (0.78, 0.71, 0.81),
        ),
    ),
    unrelated_steps=(1, 2),
)

TEST = Material(
    frames=(
        Frame("lighthouse_owner", "person", "The man who owned the lighthouse was {x}."),
        Frame("stranger_train", "person", "{a x} stranger sat down next to us on the train.", 0.8),
        Frame("bride_felt", "mood", "On the morning of the wedding the bride felt {x}."),
        Frame("apprentice_sounded", "mood", "The apprentice sounded {x} on the telephone.", 0.95),
        Frame("indian_cushion", "thing", "Our hosts showed us {a x} cushion from India.", 0.85),
        Frame("guest_pillow", "thing", "The pillow on the guest bed is {x}."),
        Frame("aunt_kitchen", "place", "My aunt's kitchen is {x}."),
        Frame("brothers_bedroom", "place", "The brothers share {a x} bedroom at the back.", 0.85),
        Frame("town_lectures", "task", "The lectures at the town hall are {x}."),
        Frame("newsletter", "task", "All members of the club receive {a x} newsletter.", 0.85),
        Frame("lettuce", "food", "The lettuce from the supermarket was {x}."),
        Frame("apples_bowl", "food", "There are some {x} apples in the bowl by the window.", 0.8),
        Frame("canal_track", "road", "The track along the canal is {x}."),
        Frame("sailor_gold", "deed", "The old sailor {x} the gold."),
        Frame("dublin_play", "stance", "The students {x} the play that they saw in Dublin."),
        Frame("swimmer_berlin", "contest", "The Danish swimmer {x} in Berlin."),
        Frame("front_hotel", "object", "There is {a x} in front of the hotel."),
        Frame("mountain_picture", "spot", "She took a picture of the {x} of the mountain.", 0.9),
        Frame("left_thursday", "time", "Nina left the office {x} on Thursday.", 0.95),
    ),
    families=(
        Family("person", "friendly", "amiable", 0.93, "hostile", 0.2, "bearded", 0.15),
        Family("person", "wealthy", "rich", 0.95, "poor", 0.21, "left-handed", 0.14),
        Family("mood", "anxious", "worried", 0.94, "confident", 0.23, "bored", 0.25),
        Family("thing", "beautiful", "lovely", 0.93, "ugly", 0.21, "rectangular", 0.15),
        Family("thing", "soft", "fluffy", 0.86, "hard", 0.22, "grey", 0.15),
        Family("place", "tidy", "neat", 0.95, "messy", 0.21, "sunny", 0.19),
        Family("task", "useful", "helpful", 0.94, "useless", 0.21, "monthly", 0.15),
        Family("food", "fresh", "crisp", 0.87, "rotten", 0.2, "organic", 0.23),
        Family("road", "smooth", "even", 0.92, "bumpy", 0.22, "signposted", 0.16),
        Family("deed", "hid", "concealed", 0.95, "revealed", 0.23, "weighed", 0.2),
        Family("stance", "enjoyed", "liked", 0.92, "hated", 0.2, "reviewed", 0.28),
        Family("contest", "won", "came first", 0.93, "came last", 0.23, "trained", 0.26),
        Family("object", "taxi", "cab", 0.95, None, 0.0, "statue", 0.18),
        Family("spot", "top", "summit", 0.94, "foot", 0.34, "map", 0.24),
        Family("time", "early", "ahead of time", 0.94, "late", 0.28, "alone", 0.28),
    ),
    contrast_frames={
        "quantity": (
            Frame("swans", "number", "{x} swans were floating on the pond."),
            Frame("songs_break", "number", "After the break the band played {x} songs.", 0.95),
            Frame("cookery_books", "number", "The professor owns {x} cookery books."),
            Frame("cottage_empty", "duration", "Nobody had lived in the cottage for {x}.", 0.95),
            Frame("library_closed", "duration", "The library will stay closed for {x}."),
            Frame("ferry", "rate", "The ferry runs {x}."),
            Frame("some_bread", "portion", "There was only {x} bread left.", 0.95),
        ),
        "specificity": (
            Frame("planted_church", "plant", "{a x} was planted in front of the church."),
            Frame("windy_hill", "plant", "The photograph shows {a x} on a windy hill.", 0.95),
            Frame("forgot_pool", "clothing", "He forgot his {x} at the swimming pool."),
            Frame("ground_floor", "clothing", "You can buy {x} on the ground floor."),
        ),
    },
    contrasts={
        "quantity": (
            Contrast("number", "seven", "eight", 0.58),
            Contrast("number", "thirty", "sixty", 0.48),
            Contrast("duration", "a fortnight", "a decade", 0.4),
            Contrast("rate", "hourly", "daily", 0.46),
            Contrast("portion", "a slice of", "a loaf of", 0.48),
        ),
        "specificity": (
            Contrast("plant", "oak", "tree", 0.76),
            Contrast("plant", "lily", "flower", 0.76),
            Contrast("clothing", "jeans", "clothes", 0.68),
            Contrast("clothing", "sandals", "shoes", 0.77),
        ),
    },
    role_frames=(
        RoleFrame(
            "rescued",
            "people",
            "The {x} rescued the {y}.",
            0.47,
            "The {y} was rescued by the {x}.",
        ),
        RoleFrame(
            "invited",
            "people",
            "Every summer the {x} invites the {y} to a garden party.",
            0.52,
            "Every summer the {y} is invited to a garden party by the {x}.",
        ),
        RoleFrame(
            "older",
            "people",
            "The {x} is older than the {y}.",
            0.4,
            "The {y} is younger than the {x}.",
            0.95,
            converse=True,
        ),
    ),
    role_pairs=(
        RolePair("people", "pilot", "barber"),
        RolePair("people", "duchess", "journalist"),
    ),
    negation_frames=(
        NegationFrame(
            "woman_is", "doing", "The woman is {x}.", "The woman is not {x}.", "not", 0.28
        ),
        NegationFrame(
            "everyone_was",
            "doing",
            "At that moment everybody was {x}.",
            "At that moment nobody was {x}.",
            "nobody",
            0.22,
        ),
        NegationFrame(
            "remember_to", "plan", "Remember to {x}.", "Remember not to {x}.", "not", 0.26
        ),
        NegationFrame("why_did", "plan", "Why did you {x}?", "Why didn't you {x}?", "n't", 0.3),
    ),
    predicates=(
        Predicate("doing", "wearing a helmet"),
        Predicate("doing", "looking at the camera"),
        Predicate("plan", "lock the door"),
        Predicate("plan", "tell Simon about the letter"),
    ),
    negated_pairs=(
        NegatedPair("likes_fish", "Tom likes fish.", "Tom does not like fish.", "not", 0.24),
        NegatedPair(
            "lake_deep",
            "The lake is deep enough for diving.",
            "The lake isn't deep enough for diving.",
            "n't",
            0.27,
        ),
        NegatedPair(
            "ever_repaired",
            "The church clock has been repaired since the war.",
            "The church clock has never been repaired since the war.",
            "never",
            0.26,
        ),
        NegatedPair(
            "room_view",
            "We would like a room with a view of the sea.",
            "We would like a room without a view of the sea.",
            "without",
            0.4,
        ),
    ),
    paraphrases=(
        Group(
            "elected",
            "law",
            (
                "The citizens elected her mayor for the third time.",
                "For the third time she was elected mayor.",
                "The voters chose her as their mayor once more, for a third term.",
            ),
            (0.97, 0.95, 0.93),
        ),
        Group(
            "puppies",
            "animals",
            (
                "Yesterday our dog had five puppies.",
                "Five puppies were born to our dog yesterday.",
                "Our dog gave birth to five puppies yesterday.",
            ),
            (0.97, 0.98, 0.97),
        ),
        Group(
            "guitar_lessons",
            "music",
            (
                "She is learning to play the guitar.",
                "She is taking guitar lessons.",
                "She has lessons in which she is taught to play the guitar.",
            ),
            (0.92, 0.94, 0.97),
        ),
        Group(
            "sunny_weekend",
            "weather",
            (
                "It will be sunny at the weekend.",
                "The forecast promises sunshine for the weekend.",
                "According to the forecast, the sun will shine at the weekend.",
            ),
            (0.93, 0.93, 0.97),
        ),
        Group(
            "salt_water",
            "food",
            (
                "Do not forget to put salt in the water before you cook the potatoes.",
                "Remember to salt the water before cooking the potatoes.",
                "The water for the potatoes has to be salted before you boil them.",
            ),
            (0.98, 0.93, 0.93),
        ),
    ),
    details=(
        Group(
            "boy_fishing",
            "",
            (
                "A boy is fishing.",
                "A boy is fishing from a bridge.",
                "A boy in rubber boots is fishing from a wooden bridge.",
            ),
            (0.75, 0.65, 0.8),
        ),
        Group(
            "letter_came",
            "",
            (
                "A letter came.",
                "A letter came from the tax office.",
                "This morning a letter came from the tax office in the capital.",
            ),
            (0.72, 0.63, 0.8),
        ),
        Group(
            "sold_paintings",
            "",
            (
                "The gallery sold a painting.",
                "The gallery sold a painting to a collector.",
                "The gallery sold a painting by a local artist to a Swiss collector.",
            ),
            (0.78, 0.68, 0.79),
        ),
    ),
    unrelated_steps=(1, 2),
)

MATERIAL: dict[str, Material] = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
