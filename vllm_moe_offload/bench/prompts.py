"""What the engines of a comparison are asked where no prompts are given: about many things, so that experts change."""

PROMPTS = (
    'def is_palindrome(text: str) -> bool:\n    """Whether text reads the same backwards, spaces ignored."""\n',
    "Question: A train covers 180 km in 2 hours and 15 minutes. What is its average speed in km per hour?\nAnswer:",
    "The water cycle describes how water moves between the oceans, the atmosphere and the land. It begins when",
    "SELECT customers.name, SUM(orders.amount) AS total\nFROM customers\nJOIN orders ON",
    "Translate into French: The library is closed on Mondays, but you can return books through the slot.\nFrench:",
    "Dear Ms. Okafor,\n\nthank you for your letter of 3 March. We are sorry to hear that the chair arrived damaged. We",
    "#include <stdio.h>\n\n/* Print the first n prime numbers. */\nvoid primes(int n) {\n",
    "Photosynthesis takes place in two stages. In the first, the light-dependent reactions,",
    "Recipe for lentil soup (4 portions)\n\nIngredients:\n- 250 g red lentils\n- 2 carrots\n- 1 onion\n",
    "The patient is a 54-year-old woman who presents with shortness of breath on exertion. On examination",
    "In the summer of 1911 the harbour town was so quiet that one could hear the ropes creak. Old Mattis",
    "impl Iterator for Fibonacci {\n    type Item = u64;\n\n    fn next(&mut self) -> Option<u64> {\n",
    "Question: Which planet has the shortest day, and how long does it take to rotate once?\nAnswer:",
    "A contract is formed when an offer is accepted. An offer can be withdrawn at any time before",
    "Theorem. The square root of 2 is irrational.\nProof. Suppose to the contrary that",
    "User: My laptop does not connect to the wireless network since the update. What can I try?\nAssistant:",
)
