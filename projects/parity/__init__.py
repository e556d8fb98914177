"""How accuracy compares with conventional finetuning."""
