"""Texts and conversations: documents, tokenizers, and the batches of tokens."""

from kdjax.data.text.alignment import Pairs as Pairs
from kdjax.data.text.alignment import align as align
from kdjax.data.text.alignment import tokenize_pair as tokenize_pair
from kdjax.data.text.chat import render as render
from kdjax.data.text.chat import template_text as template_text
from kdjax.data.text.documents import Documents as Documents
from kdjax.data.text.documents import from_list as from_list
from kdjax.data.text.documents import hold_out as hold_out
from kdjax.data.text.files import from_tfds as from_tfds
from kdjax.data.text.files import read as read
from kdjax.data.text.packing import blank_rows as blank_rows
from kdjax.data.text.packing import check_length as check_length
from kdjax.data.text.packing import eval_batches as eval_batches
from kdjax.data.text.packing import next_token as next_token
from kdjax.data.text.packing import num_shortened as num_shortened
from kdjax.data.text.packing import train_batches as train_batches
from kdjax.data.text.pairs import pair_batches as pair_batches
from kdjax.data.text.tokenizer import Tokenizer as Tokenizer
from kdjax.data.text.tokenizer import byte_level as byte_level
from kdjax.data.text.tokenizer import from_folder as from_folder
from kdjax.data.text.tokenizer import save as save
from kdjax.data.text.tokens import Tokens as Tokens
from kdjax.data.text.tokens import tokenize as tokenize
from kdjax.data.text.vocabulary import Shared as Shared
from kdjax.data.text.vocabulary import check_rows as check_rows
from kdjax.data.text.vocabulary import shared_vocabulary as shared_vocabulary
