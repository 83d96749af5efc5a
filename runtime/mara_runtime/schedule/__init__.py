"""How much to put into the next pass: what rows cost, how likely they are needed, what may come next."""
