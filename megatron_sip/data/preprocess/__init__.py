"""From text files to indexed datasets: read, tokenize in several processes, write in order."""
