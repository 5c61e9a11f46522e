"""Small models, a small corpus and a local Ray cluster, each made once a session.

Libraries are imported inside the fixtures, because they read the environment set here when they are imported.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import pytest
from hypothesis import settings

import jobs  # noqa: F401 (sets Ray's authentication mode, which Ray reads when it is imported)

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PROMPTS = {"query": "query: ", "document": "passage: ", "passage": "passage: "}
MAX_SEQ_LENGTH = 64
# Nouns and predicates of equal meaning by position; a sentence is a noun, what joins them, and a predicate.
PHRASES = {
    "en": ("the cat|the house|water|my friend|the old book|music", " |is small|is here|is very good|sleeps today"),
    "de": (
        "die Katze|das Haus|Wasser|mein Freund|das alte Buch|Musik",
        " |ist klein|ist hier|ist sehr gut|schläft heute",
    ),
    "fr": (
        "le chat|la maison|l'eau|mon ami|le vieux livre|la musique",
        " |est petit|est ici|est très bon|dort aujourd'hui",
    ),
    "es": (
        "el gato|la casa|el agua|mi amigo|el libro viejo|la música",
        " |es pequeño|está aquí|es muy bueno|duerme hoy",
    ),
    "pt": ("o gato|a casa|a água|meu amigo|o livro velho|a canção", " |é pequeno|está aqui|é muito bom|dorme hoje"),
    "pl": ("kot|dom|woda|mój przyjaciel|stara książka|muzyka", " |jest mały|jest tutaj|jest bardzo dobry|śpi dzisiaj"),
    "ru": ("кошка|дом|вода|мой друг|старая книга|музыка", " |маленькая|здесь|очень хорошая|спит сегодня"),
    "vi": ("con mèo|ngôi nhà|nước|bạn tôi|quyển sách cũ|âm nhạc", " |nhỏ|ở đây|rất tốt|ngủ hôm nay"),
    "ar": ("القطة|البيت|الماء|صديقي|الكتاب القديم|الموسيقى", " |صغير|هنا|جيد جدا|ينام اليوم"),
    "hi": ("बिल्ली|घर|पानी|मेरा दोस्त|पुरानी किताब|संगीत", " |छोटा है|यहाँ है|बहुत अच्छा है|आज सोता है"),
    "th": ("แมว|บ้าน|น้ำ|เพื่อนของฉัน|หนังสือเก่า|ดนตรี", "|ตัวเล็ก|อยู่ที่นี่|ดีมาก|นอนวันนี้"),
    "ko": ("고양이는|집은|물은|내 친구는|오래된 책은|음악은", " |작다|여기 있다|아주 좋다|오늘 잔다"),
    "ja": ("猫は|家は|水は|友達は|古い本は|音楽は", "|小さい|ここにある|とても良い|今日眠る"),
    "zh": ("猫|房子|水|我的朋友|旧书|音乐", "|很小|在这里|非常好|今天睡觉"),
}

SENTENCES = (
    # en de fr es pt it pl ru uk ar hi bn th vi id ja zh ko tr el sq he
    "The train to the coast leaves at seven in the morning.",
    "She planted tomatoes behind the garage last spring.",
    "How much does it cost to repair a broken window?",
    "Interest rates were raised for the third time this year.",
    "ok",
    "Der Bäcker an der Ecke macht das beste Brot der Stadt.",
    "Wie lange dauert die Fahrt von Köln nach Hamburg?",
    "Die Mannschaft verlor das Spiel in der letzten Minute.",
    "Größere Äpfel schmecken nicht immer süßer.",
    "Le musée est fermé le mardi et les jours fériés.",
    "Où puis-je acheter un billet pour le concert ?",
    "L’hiver dernier, la rivière a gelé pendant deux semaines.",
    "El médico me recomendó caminar media hora cada día.",
    "¿Cuántos habitantes tiene la ciudad de Cusco?",
    "Los niños jugaban al fútbol bajo la lluvia.",
    "O café da manhã é servido até as dez horas.",
    "Quem descobriu o caminho marítimo para a Índia?",
    "A biblioteca precisa de cadeiras novas.",
    "Il gatto dorme tutto il giorno sul divano.",
    "Quanto costa un biglietto del treno per Bologna?",
    "La ricetta di mia nonna richiede tre uova.",
    "Pociąg spóźnił się o czterdzieści minut.",
    "Gdzie jest najbliższa apteka?",
    "Zeszłej jesieni zbieraliśmy grzyby w lesie.",
    "Сегодня ночью ожидается сильный снегопад.",
    "Сколько стоит аренда квартиры в центре города?",
    "Мой брат учится играть на скрипке.",
    "Учёные открыли новый вид глубоководных рыб.",
    "Потяг до Львова вирушає о шостій вечора.",
    "Діти малювали крейдою на асфальті.",
    "القطار إلى الساحل يغادر في السابعة صباحا.",
    "كم تبلغ تكلفة إصلاح النافذة المكسورة؟",
    "زرعت جدتي الطماطم خلف المنزل.",
    "आज शाम को बारिश होने की संभावना है।",
    "इस किताब का लेखक कौन है?",
    "मेरी बहन अस्पताल में नर्स है।",
    "আজ বাজারে মাছের দাম অনেক বেশি।",
    "এই নদীর নাম কী?",
    "আমার ভাই স্কুলে গণিত পড়ায়।",
    "พรุ่งนี้ร้านหนังสือจะปิดเร็วกว่าปกติ",
    "ตั๋วรถไฟไปเชียงใหม่ราคาเท่าไร",
    "แม่ปลูกมะเขือเทศไว้หลังบ้าน",
    "Cửa hàng sách đóng cửa lúc chín giờ tối.",
    "Bao lâu thì xe buýt tới sân bay?",
    "Em gái tôi đang học chơi đàn vi-ô-lông.",
    "Toko roti di sudut jalan buka pukul enam pagi.",
    "Berapa harga tiket kereta ke Bandung?",
    "Anak-anak bermain bola di bawah hujan.",
    "明日の朝は七時に駅で会いましょう。",
    "この本の著者は誰ですか？",
    "祖母は庭でトマトを育てています。",
    "コーヒーを２杯ください。",
    "今天晚上可能会下大雪。",
    "去机场的公共汽车多久一班？",
    "科学家发现了一种新的深海鱼。",
    "圖書館週一不開放。",
    "내일은 도서관이 일찍 문을 닫습니다.",
    "이 강의 이름은 무엇입니까?",
    "할머니는 마당에 토마토를 심으셨다.",
    "Tren sabah yedide sahile doğru yola çıkıyor.",
    "Kırık camı tamir etmek ne kadar tutar?",
    "Η βιβλιοθήκη κλείνει νωρίς τη Δευτέρα.",
    "Treni i fundit niset në mesnatë.",
    "רכבת הלילה לחיפה מתעכבת בשעה.",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # a test that asks the hub is a mistake
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings.register_profile("embedlib", deadline=None)  # how fast a machine is is no property of the code
    settings.load_profile("embedlib")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other make tiny models 100 times slower


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = pytest.mark.skip(reason="slow: give --run-slow to run it")
    gpu = pytest.mark.skip(reason="gpu: this machine has no CUDA device")
    has_gpu = any("gpu" in item.keywords for item in items) and cuda_is_available()
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(gpu)


def cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def corpus_rows() -> list[dict[str, Any]]:
    """336 rows in 14 languages; the group of a row is its noun and predicate, the same in every language."""
    rows = []
    for lang, (nouns, rest) in PHRASES.items():
        joint, *predicates = rest.split("|")
        for group in range(24):
            text = nouns.split("|")[group // 4] + joint + predicates[group % 4]
            rows.append({"id": len(rows), "text": text, "lang": lang, "group": group})
    return rows


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CORPUS file of 336 short sentences: 24 groups in 14 languages."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from embedlib.schemas import CORPUS

    path = tmp_path_factory.mktemp("corpus") / "corpus.parquet"
    pq.write_table(pa.Table.from_pylist(corpus_rows(), schema=CORPUS), path)
    return path


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """The sentences of `tiny_corpus`, in its order."""
    return [row["text"] for row in corpus_rows()]


@pytest.fixture(scope="session")
def sentences() -> list[str]:
    """Real sentences in 22 languages."""
    return list(SENTENCES)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "Tokenizer":
    """A Unigram tokenizer in the form of multilingual-e5's: every word and character of `tiny_corpus`."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import Unigram

    texts = [normalize("NFKC", text) for text in (*PROMPTS.values(), *(row["text"] for row in corpus_rows()))]
    words = sorted({"▁" + word for text in texts for word in text.split()})
    characters = sorted({character for word in words for character in word} - set(words))
    scored = [(word, -3 - 0.01 * index) for index, word in enumerate(words)]
    scored += [(character, -9 - 0.01 * index) for index, character in enumerate(characters)]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = [*((special, 0.0) for special in specials), *scored, ("<mask>", 0.0)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*specials, "<mask>"])
    return tokenizer


def write_encoder(directory: Path, body: "PreTrainedModel", tokenizer: "Tokenizer", pooling_mode: str) -> Path:
    from embedlib.model_directory import write_body, write_head, write_tokenizer

    write_body(directory, body)
    write_tokenizer(directory, tokenizer, MAX_SEQ_LENGTH)
    write_head(directory, body.config.hidden_size, pooling_mode, PROMPTS)
    return directory


def body_values(tokenizer: "Tokenizer") -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.get_vocab_size() + 3,  # padding rows after the pieces, as in the real models
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": MAX_SEQ_LENGTH + 2,
        "initializer_range": 0.2,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "Tokenizer") -> Path:
    """A sentence-transformers directory: BertModel, 4 layers, 32 wide, mean pooling, random weights."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    body = BertModel(BertConfig(**body_values(tiny_tokenizer)), add_pooling_layer=False)
    return write_encoder(tmp_path_factory.mktemp("tiny_encoder"), body, tiny_tokenizer, "mean_tokens")


@pytest.fixture(scope="session")
def tiny_xlmr(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "Tokenizer") -> Path:
    """A sentence-transformers directory: XLMRobertaModel, 4 layers, 32 wide, CLS pooling, positions from 2."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(1)
    body = XLMRobertaModel(XLMRobertaConfig(**body_values(tiny_tokenizer)), add_pooling_layer=False)
    return write_encoder(tmp_path_factory.mktemp("tiny_xlmr"), body, tiny_tokenizer, "cls_token")


@pytest.fixture(scope="session")
def tiny_cross_encoder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "Tokenizer") -> Path:
    """A transformers directory: BertForSequenceClassification with one label, 2 layers, 32 wide, random weights."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    torch.manual_seed(2)
    values = body_values(tiny_tokenizer) | {"num_hidden_layers": 2, "num_labels": 1}
    directory = tmp_path_factory.mktemp("tiny_cross_encoder")
    BertForSequenceClassification(BertConfig(**values)).save_pretrained(directory)
    specials = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer, model_max_length=MAX_SEQ_LENGTH, **specials)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def embedded_teacher() -> Path:
    """multilingual-e5-small, 4-bit, converted once into the user's cache."""
    from embedlib.pretrained import EMBEDDED_TEACHER, pretrained_directory

    return pretrained_directory(EMBEDDED_TEACHER)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local cluster of four logical CPUs with token authentication."""
    import ray

    from jobs.runtime import quiet, require_token

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path_factory.mktemp("ray") / "auth_token"))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve.proxy:middlewares")
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # its first import may take 15 s, and it is killed
        patch.setenv("RAY_worker_niceness", "0")
        quiet()
        require_token()
        ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """A real browser without a window; while it is there an event loop runs, so it is given back with the module."""
    from playwright.sync_api import sync_playwright

    path = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"browser: none of {', '.join(BROWSERS)} is installed; .ci/run installs one where it may")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
