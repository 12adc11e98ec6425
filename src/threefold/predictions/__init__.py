"""The array boundary: probabilities (members, rows, classes), their files and the run folder.

`Predictions` holds the probabilities with labels, ids and the rows that each network has seen.
`RunFolder` reads and writes the files of a run without torch.
"""
