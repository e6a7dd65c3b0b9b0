"""How users say things: phrasings of each act of a scripted conversation, trained ones and ones kept for measuring.

A slot in braces is one mention in one role (`genrec.query_schema`; "value" and "number" play none). An act without
slots speaks of the whole list, or of nothing.
"""

from __future__ import annotations

TRAINED: dict[str, tuple[str, ...]] = {
    "want": (
        *("a {want}", "{want} please", "I want {want}", "I'd like {want}", "I am looking for {want}", "show me {want}"),
        *("something in {want}", "make it {want}", "it should be {want}", "I need something {want}", "only {want}"),
        *("{want} would be nice", "how about {want}", "I prefer {want}", "it has to be {want}", "do you have {want}"),
        *("actually {want}", "let's go with {want}", "then {want}", "one with {want}", "I love {want}"),
    ),
    "want two": (
        *("a {want} {want}", "{want} and {want}", "something {want}, {want}", "a {want} with {want}", "{want}, {want}"),
        *("I want {want} for {want}", "I'd like a {want} in {want}", "it should be {want} and {want}"),
        *("looking for a {want} {want}", "show me {want} made for {want}"),
    ),
    "either": (
        *("{want} or {want}", "either {want} or {want}", "I want {want} or {want}", "it can be {want} or {want}"),
        *("something in {want} or {want}", "show me {want} or {want}", "{want} or maybe {want}"),
    ),
    "also": (
        *("{also} is fine too", "or {also}", "{also} would also do", "{also} as well", "{also} is okay as well"),
        *("also {also}", "I could live with {also} too", "add {also}", "you may include {also}", "and {also} too"),
    ),
    "avoid": (
        *("not {avoid}", "no {avoid}", "nothing in {avoid}", "anything but {avoid}", "I don't like {avoid}"),
        *("without {avoid}", "{avoid} is not for me", "I hate {avoid}", "leave out {avoid}", "no {avoid} please"),
        *("don't show me {avoid}", "I don't want {avoid}", "{avoid} is out", "never {avoid}", "please no {avoid}"),
    ),
    "avoid two": (
        *(
            "neither {avoid} nor {avoid}",
            "no {avoid} and no {avoid}",
            "not {avoid} or {avoid}",
            "no {avoid}, no {avoid}",
        ),
        *("I don't like {avoid} or {avoid}", "nothing in {avoid} or {avoid}", "without {avoid} and {avoid}"),
    ),
    "rather": (
        *("{want} instead of {drop}", "rather {want} than {drop}", "not {avoid} but {want}", "{want}, not {avoid}"),
        *(
            "no {avoid}, I want {want}",
            "{want} but no {avoid}",
            "I prefer {want} over {drop}",
            "{want} without {avoid}",
        ),
        *("instead of {drop} I want {want}", "forget {drop}, show me {want}"),
    ),
    "drop": (
        *("forget {drop}", "{drop} doesn't matter any more", "it needn't be {drop}", "never mind {drop}"),
        *("{drop} is not a must", "it doesn't have to be {drop}", "forget about {drop}", "I don't insist on {drop}"),
        *("drop {drop}", "{drop} is no longer important"),
    ),
    "drop name": (
        *("any {drop} is fine", "the {drop} doesn't matter", "forget the {drop}", "I don't care about the {drop}"),
        *("whatever {drop}", "the {drop} is not important", "never mind the {drop}", "all {drop} are fine"),
    ),
    "max": (
        *("under {max}", "at most {max}", "no more than {max}", "up to {max}", "below {max}", "my budget is {max}"),
        *("max {max}", "for less than {max}", "it may cost {max}", "not over {max}", "cheaper than {max}"),
        *("I can spend {max}", "nothing above {max}", "I don't want to pay more than {max}"),
    ),
    "min": (
        *("at least {min}", "over {min}", "above {min}", "more than {min}", "not below {min}", "{min} or more"),
        *("it should cost at least {min}", "nothing under {min}", "from {min} upwards", "not less than {min}"),
    ),
    "range": (
        *("between {min} and {max}", "from {min} to {max}", "{min} to {max}", "more than {min} but less than {max}"),
        *("over {min} and under {max}", "at least {min} and at most {max}", "somewhere between {min} and {max}"),
    ),
    "count": (
        *("show me {count}", "{count} items please", "give me {count} ideas", "just {count}", "I need {count}"),
        *("{count} of them", "{count} suggestions", "I want to see {count}", "only {count} please", "list {count}"),
        *("{count} results", "show {count} things", "{count} will do"),
    ),
    "some": (
        *("{count} {want}", "show me {count} {want}", "{count} {want} please", "I need {count} of {want}"),
        *("I'd like to see {count} {want}", "give me {count} {want}", "{count} ideas for {want}"),
    ),
    "priced": (
        *("a {want} under {max}", "{want} for less than {max}", "{want} below {max}", "a {want} for at most {max}"),
        *("{want} up to {max}", "I want {want} for {max} or less", "show me {want} under {max}"),
    ),
    "cheaper": (
        *("cheaper", "something cheaper", "that's too expensive", "cheaper please", "a lower price please"),
        *("can you go cheaper", "these cost too much", "too expensive", "do you have cheaper ones", "less expensive"),
        *("I can't afford that", "anything cheaper"),
    ),
    "dearer": (
        *("more expensive", "something more expensive", "pricier please", "it may cost more", "that's too cheap"),
        *("these look too cheap", "something dearer", "higher price please", "do you have pricier ones"),
    ),
    "any price": (
        *("price doesn't matter", "the price is not important", "whatever it costs", "money is no object"),
        *("forget the budget", "any price is fine", "I don't care about the price", "forget the price"),
    ),
    "like": (
        *("more like {like}", "I like {like}", "{like} is great", "similar to {like}", "something like {like}"),
        *("I love {like}", "more of the kind of {like}", "{like} is nice", "{like} looks good", "as {like}"),
    ),
    "dislike": (
        *(
            "not {dislike}",
            "none like {dislike}",
            "I don't like {dislike}",
            "{dislike} is ugly",
            "nothing like {dislike}",
        ),
        *("no more like {dislike}", "I hate {dislike}", "{dislike} is not for me", "don't show me {dislike} again"),
        *("leave out {dislike}", "I already have {dislike}"),
    ),
    "below item": (
        *("cheaper than {cheaper}", "it should cost less than {cheaper}", "{cheaper} is too expensive"),
        *("less expensive than {cheaper}", "I can't afford {cheaper}", "{cheaper} costs too much"),
    ),
    "above item": (
        *("more expensive than {dearer}", "it may cost more than {dearer}", "{dearer} is too cheap"),
        *("pricier than {dearer}", "{dearer} looks too cheap"),
    ),
    "start over": (
        *(
            "let's start over",
            "forget everything",
            "start again",
            "new search",
            "forget all that",
            "from the beginning",
        ),
        "something completely different",
    ),
    "chatter": (
        *("thanks", "hm", "let me think", "nice shop", "it's a gift for my sister", "what a day", "are you there"),
        *("my mother told me about you", "I have {number} kids", "my son turns {number}", "I bought {value} last year"),
        *("my old one was {value}", "it is for a room in {value}", "I was here {number} times", "I saw {value} once"),
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "want": ("have you got {want}", "I fancy {want}", "could it be {want}", "it must be {want}", "go for {want}"),
    "want two": ("I'm after a {want} in {want}", "a nice {want} {want}", "I need a {want}, best in {want}"),
    "either": ("{want} or {want}, both are fine", "I don't mind, {want} or {want}", "maybe {want} or {want}"),
    "also": ("{also} is all right too", "or else {also}", "I would take {also} as well"),
    "avoid": ("please avoid {avoid}", "I can't stand {avoid}", "anything except {avoid}", "skip {avoid}"),
    "avoid two": ("I want neither {avoid} nor {avoid}", "please avoid {avoid} and {avoid}"),
    "rather": ("I'd rather have {want} than {drop}", "{want} please, and not {avoid}", "no {avoid}, {want} instead"),
    "drop": ("it can be something other than {drop} too", "forget what I said about {drop}", "{drop} isn't needed"),
    "drop name": ("I'm open about the {drop}", "the {drop} is up to you", "{drop} is not an issue"),
    "max": ("it must not cost more than {max}", "I have {max} to spend", "{max} at most", "within {max}"),
    "min": ("starting at {min}", "it should be worth {min} or more", "{min} at least"),
    "range": ("anywhere from {min} to {max}", "not less than {min} and not more than {max}"),
    "count": ("let me see {count}", "{count} options would do", "can I have {count}", "name {count}"),
    "some": ("name {count} {want}", "can I see {count} {want}", "{count} kinds of {want}"),
    "priced": ("a {want} of no more than {max}", "{want}, max {max}", "is there {want} within {max}"),
    "cheaper": ("a bit cheaper", "that's more than I can spend", "isn't there anything less expensive"),
    "dearer": ("a bit more expensive", "I can spend more than that", "something of a higher price"),
    "any price": ("I don't mind the price", "cost is no issue", "never mind the price"),
    "like": ("I really like {like}", "more in the style of {like}", "{like} comes close", "I enjoyed {like}"),
    "dislike": ("please nothing like {dislike}", "I can't stand {dislike}", "{dislike} is awful"),
    "below item": ("{cheaper} is more than I can pay", "something less expensive than {cheaper}"),
    "above item": ("something more expensive than {dearer}", "above the price of {dearer}"),
    "start over": ("let us begin again", "scrap all that", "forget all I said"),
    "chatter": ("good to know", "one moment", "I asked {number} friends", "my aunt has {value}", "well well"),
}

OPENINGS = ("", "", "", "Hi! ", "Hello, ", "Good morning. ", "Hey, ", "Well, ", "OK, ", "Sorry, ", "Hm, ", "Please, ")
JOINTS = (", ", ", ", " and ")
PARTINGS = (". ", "; ", ", but ", ". And ")  # where a joint would carry a "not" over to what follows
ENDINGS = ("", "", "", ".", "!", " please", " thanks", ", thank you", ". It's a gift.", ". What do you have?", "?")
PLACES = ("the {}", "the {} one", "the {} of these", "your {} one")  # of an ordinal
NUMBERED = ("number {}", "#{}", "item {}")
MONEY = ("{}", "{}", "${}", "{} euros", "€{}", "{} dollars")
