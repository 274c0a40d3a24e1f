"""Gates on the embedded model: six topics written by hand, each against the other five, on prompts that were held out.

    python benchmarks/gates.py            # shares and decode time; fails where a mark is missed

Marks: every gate opens for at least 0.95 of its topic's prompts on average and for at most 0.06 of the others; a decoded
token takes at most 1.02 of the time that ungated steering of the same tokens takes.
"""

import argparse
import sys
import time

import torch

from steering_vectors import SteeringVector, Tokens, train_gate
from steering_vectors.demo import load_demo_model

TOPICS = {
    "cooking": """How long should I boil an egg?|What can I use instead of butter in a cake?|How do I keep rice from sticking?|Which spices go well with lamb?
Why did my bread not rise?|How do I make a simple tomato sauce?|What is the best way to roast potatoes?|Can I freeze cooked pasta?
How do I cut an onion without crying?|What does it mean to blanch vegetables?|How much salt goes into soup for four?|How do I know when a chicken is done?
What should I do with leftover mashed potatoes?|How can I thicken a gravy?|Which oil is best for frying fish?|How do I make pancakes fluffy?
What is a good marinade for tofu?|How do I store fresh basil?|Can you suggest a quick dinner with lentils?|Why is my cheesecake cracked?
How do I caramelise sugar safely?|What is the difference between baking soda and baking powder?|How do I season a cast iron pan?|What goes into a good vinaigrette?
How long can I keep soup in the fridge?|How do I make pizza dough at home?|What is the secret of crisp bacon?|How do I poach a pear?
Which cheese melts best on a burger?|How do I whip cream by hand?|What can I bake with ripe bananas?|How do I make stock from bones?""",
    "football": """Who won the football world cup in 2014?|What is the offside rule?|How many players are on a football team?|Which striker scored the most goals last season?
Why did the referee show a red card?|How does a penalty shootout work?|What does a defensive midfielder do?|Which club has won the league most often?
How long is a football match with extra time?|What is a hat trick in football?|How can I improve my dribbling on the pitch?|When does the transfer window close?
Why do goalkeepers wear gloves?|What is the best formation against a strong attack?|How do I take a good free kick?|Who is the captain of the national team?
What happens when a match ends in a draw?|How big is a football pitch?|Which stadium hosted the final?|What does the assistant referee signal?
How do I train for longer throw-ins?|Why was the goal disallowed?|What is a clean sheet for a goalkeeper?|How does promotion and relegation work?
Which team plays in the cup final tonight?|How do coaches choose substitutes?|What is pressing in modern football?|How do I head the ball safely?
Who scored the winning goal in the derby?|What is the away goals rule?|How do fans get tickets for the match?|How many yellow cards mean a ban?""",
    "programming": """How do I reverse a list in Python?|What is a memory leak?|How do I write a loop in C?|Why does my function return None?
What is the difference between a class and an object?|How do I read a file line by line in code?|What does a compiler do?|How do I sort a dictionary by value?
Why do I get an index out of range error?|How do I connect my script to a database?|What is recursion in programming?|How do I write a unit test?
What is a pull request in git?|How do I parse JSON in JavaScript?|What is the time complexity of binary search?|How do I debug a segmentation fault?
What does the static keyword mean in Java?|How do I install a package with pip?|What is an API endpoint?|How can I make this SQL query faster?
Why is my variable undefined?|How do I merge two branches in git?|What is a regular expression?|How do I handle exceptions in Python?
What is the difference between a stack and a queue?|How do I write a recursive function?|What is a null pointer?|How do threads share data in a program?
How do I convert a string to an integer in code?|What is object oriented programming?|How do I call a REST API from a script?|Why does my while loop never end?""",
    "gardening": """When should I plant tomatoes?|How often do I water a cactus?|Why are the leaves of my roses yellow?|How do I get rid of slugs in the garden?
What is the best soil for carrots?|How do I prune an apple tree?|Which flowers grow in the shade?|When do I sow lettuce seeds?
How do I start a compost heap?|Why does my basil plant wilt?|How deep should I plant tulip bulbs?|What can I grow on a north facing balcony?
How do I keep weeds out of the flower bed?|When is the time to harvest pumpkins?|How do I repot an orchid?|Which plants attract bees?
How do I protect seedlings from frost?|What fertiliser do strawberries need?|How do I grow potatoes in a bucket?|Why is there moss in my lawn?
How far apart should I plant cabbages?|Can I grow an avocado from the stone?|How do I propagate lavender from cuttings?|What eats holes into my hosta leaves?
When should I cut back the hedge?|How do I grow mint without it spreading?|What is mulch good for in a garden?|How do I save seeds from my sunflowers?
Why do my peppers drop their blossoms?|How much sun does a lemon tree need?|How do I plant a new lawn?|Which vegetables grow well together in a bed?""",
    "medicine": """What are the symptoms of the flu?|How is high blood pressure treated?|Is it safe to take aspirin with ibuprofen?|Why do I have a headache every morning?
What does a high cholesterol level mean?|How long does a broken arm take to heal?|When should a fever worry me?|What are the side effects of antibiotics?
How does a vaccine work in the body?|What causes type two diabetes?|Why does my knee hurt when I climb stairs?|How do doctors test for an allergy?
What is a normal resting heart rate?|How can I treat a mild burn on my skin?|What are the signs of a stroke?|Is this rash on my arm contagious?
How much sleep does an adult need for good health?|What should I do about a sprained ankle?|Why do I feel dizzy when I stand up?|How is asthma diagnosed?
What does an X-ray show of the lungs?|Can stress cause stomach pain?|How do I know whether a cut needs stitches?|What is anaemia and how is it treated?
Why does my throat hurt when I swallow?|How long is a patient contagious with a cold?|What are the risks of this surgery?|How do I lower my blood sugar?
What is the right dose of paracetamol for a child?|Why are my ankles swollen?|How is pneumonia treated in hospital?|What causes a migraine?""",
    "money": """How do I save for retirement?|What is a mortgage?|How does compound interest work?|Should I pay off my credit card first?
What is the difference between stocks and bonds?|How do I make a monthly budget?|What does inflation do to my savings?|How can I improve my credit score?
Is it better to rent or to buy a house?|What is an index fund?|How much tax do I pay on dividends?|How do I open a bank account abroad?
What is a good interest rate for a loan?|How do I invest a small sum every month?|What happens if I miss a loan payment?|How do exchange rates change prices?
What is a pension fund?|How do I file my income tax return?|Should I take out a loan for a new car?|What is the stock market doing today?
How much should I keep in an emergency fund?|What does it mean to default on a debt?|How do banks make a profit?|What are the fees of this investment account?
How can I get out of debt faster?|What is a fair salary for a beginner?|How does an insurance premium get calculated?|Is gold a safe investment?
What is the capital gains tax?|How do I split the bills with my partner?|When should I sell my shares?|How do I ask my bank for a lower rate?""",
}
LAYER, HELD_OUT = 9, 12


def prompts_of(topic: str) -> list[list[dict[str, str]]]:
    questions = [q.strip() for q in TOPICS[topic].replace("\n", "|").split("|")]
    return [[{"role": "user", "content": q}] for q in questions]


def batch_of(tokenizer, prompts):
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


def opened(model, tokenizer, v, gate, prompts) -> list[bool]:
    "Which prompts a gate opens for, asked through steering itself, in left-padded batches."
    found = []
    for at in range(0, len(prompts), 16):
        batch = batch_of(tokenizer, prompts[at : at + 16])
        with torch.no_grad(), v.apply(model, when=gate, prompt=batch) as handle:
            model(**batch)
        found += handle.decisions.open.tolist()
    return found


def shares(model, tokenizer, v) -> tuple[float, float]:
    "Of each topic, and on average: the share of its own and of other held-out prompts."
    own, others = [], []
    print(f"{'topic':12} own   others  (as the gate was judged)")
    for topic in TOPICS:
        rest = [t for t in TOPICS if t != topic]
        gate = train_gate(
            model, tokenizer, prompts_of(topic)[:-HELD_OUT], [p for t in rest for p in prompts_of(t)[:-HELD_OUT]], LAYER
        )
        mine = opened(model, tokenizer, v, gate, prompts_of(topic)[-HELD_OUT:])
        not_mine = opened(model, tokenizer, v, gate, [p for t in rest for p in prompts_of(t)[-HELD_OUT:]])
        own.append(sum(mine) / len(mine))
        others.append(sum(not_mine) / len(not_mine))
        print(f"{topic:12} {own[-1]:.3f} {others[-1]:.3f}  {gate!r}", flush=True)
    print(f"{'mean':12} {sum(own) / len(own):.3f} {sum(others) / len(others):.3f}")
    return sum(own) / len(own), sum(others) / len(others)


def decode_ratio(model, tokenizer, v, rounds: int, tokens: int = 48) -> float:
    "Time of a decoded token, gated over ungated: the median of rounds in which the two take turns."
    topics = list(TOPICS)
    gate = train_gate(model, tokenizer, prompts_of(topics[0])[:20], prompts_of(topics[1])[:20], LAYER)
    batch = batch_of(tokenizer, prompts_of(topics[0])[:4])

    def seconds(**how) -> float:
        with v.apply(model, prompt=batch, **how):
            start = time.perf_counter()
            model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            return time.perf_counter() - start

    seconds(when=gate), seconds(tokens=Tokens.response)
    ratios = []
    for i in range(rounds):
        first, second = ({"when": gate}, {"tokens": Tokens.response})[:: 1 if i % 2 else -1]
        a, b = seconds(**first), seconds(**second)
        ratios.append(a / b if "when" in first else b / a)
    ratio = sorted(ratios)[len(ratios) // 2]
    print(f"decode time, gated over ungated: {ratio:.3f} (median of {rounds}; {min(ratios):.3f} to {max(ratios):.3f})")
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    model, tokenizer = load_demo_model()
    width = model.config.hidden_size
    v = SteeringVector({15: torch.randn(width, generator=torch.Generator().manual_seed(0))})
    own, others = shares(model, tokenizer, v)
    ratio = decode_ratio(model, tokenizer, v, args.rounds)
    kept = own >= 0.95 and others <= 0.06 and ratio <= 1.02
    print("every mark is met" if kept else "a mark is missed: 0.95 of its own, 0.06 of others, 1.02 of the time")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
