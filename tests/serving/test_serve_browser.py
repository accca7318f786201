"""The page in a browser: clips follow the typing, a new seed, an uploaded image, and lines for bad input."""

import time

import pytest
from browser import open_browser
from PIL import Image
from served import PATIENCE, serving

from vpae_jax.evaluation.rows import Entry

ENTRIES = [Entry("teacher", "tiny", 2, 2.0), Entry("student", "tiny", 1, 1.0)]


@pytest.fixture(scope="module")
def driver():
    found = open_browser("window-size=1200,1500")  # of videos that it does not show, a browser plays none
    yield found
    found.quit()


class Page:
    """What a person sees, and does."""

    def __init__(self, driver):
        self.driver = driver

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition):
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, self.find("main").text
            time.sleep(0.05)
        return found

    def clips(self):
        """Addresses of the clips that play, once all of them do and nothing is being made; else None."""
        states = [panel.get_attribute("data-state") for panel in self.all(".panel")]
        moved = "return [...document.querySelectorAll('.panel video')].every(video => video.played.length > 0)"
        if self.find("#status").text or states != ["done"] * 2 or not self.driver.execute_script(moved):
            return None
        return [video.get_attribute("src") for video in self.all(".panel video")]

    def others(self, before):
        """The next clips."""
        return self.wait(lambda: (found := self.clips()) and not set(found) & set(before) and found)

    def write(self, selector, text):
        field = self.find(selector)
        field.clear()
        field.send_keys(text)


def faults(driver):
    """What the browser complains about, but for answers of status 400, which are shown."""
    return [line for line in driver.get_log("browser") if "status of 400" not in line["message"]]


@pytest.mark.long
def test_typing_makes_clips(driver, tmp_path):
    with serving(ENTRIES, tmp_path, generate="typing") as server:
        driver.get(server.where)
        page = Page(driver)
        page.find("#prompt").send_keys("a three moves up")
        first = page.wait(page.clips)
        evaluations = [field.text for field in page.all(".evaluations")]
        assert evaluations == ["4", "1"] and all(field.text.endswith("s") for field in page.all(".total"))
        assert len(page.all("#gallery li")) == 1  # what was typed on the way is not kept
        link = page.find(".download")
        assert link.get_attribute("href") == first[0] and link.get_attribute("download") == "teacher-seed0.mp4"

        page.find("#new-seed").click()
        seeded = page.others(first)
        assert page.find("#seed").get_attribute("value") != "0" and len(page.all("#gallery li")) == 2

        Image.new("RGB", (96, 48), (255, 255, 255)).save(tmp_path / "first.png")
        page.find("#image").send_keys(str(tmp_path / "first.png"))
        with_image = page.others(seeded)
        size = driver.execute_script("const v = document.querySelector('video'); return [v.videoWidth, v.videoHeight]")
        assert size[0] > size[1]  # as the image's
        assert "full" in page.find("#drop").get_attribute("class")

        page.write("#seed", "-1")
        page.wait(lambda: page.find("#fault").text.startswith("seed is -1, expected a number from 0"))
        page.write("#seed", "7")
        page.others(with_image)
        assert not page.find("#fault").text

        page.write(".panel[data-model=student] .steps", "0")
        page.wait(lambda: page.find("#fault").text == "student: steps is 0; expected a whole number from 1 to 100")
        (tmp_path / "text.png").write_text("no image")
        page.find("#image").send_keys(str(tmp_path / "text.png"))
        page.wait(lambda: page.find("#fault").text.startswith("image: "))

        page.all("#gallery button")[-1].click()  # the first clips again, with what they were made of
        assert page.wait(page.clips) == first and not page.find("#fault").text
        values = [
            page.find(field).get_attribute("value") for field in ("#prompt", "#seed", "[data-model=student] .steps")
        ]
        assert values == ["a three moves up", "0", "1"]
        assert "full" not in page.find("#drop").get_attribute("class")
        assert not faults(driver)


@pytest.mark.long
def test_a_button_makes_clips(driver, tmp_path):
    with serving(ENTRIES, tmp_path, generate="button", example="a three moves up") as server:
        driver.get(server.where)
        page = Page(driver)
        assert "press Generate" in page.find("#decision").text and not page.clips()
        page.find("#generate").click()
        first = page.wait(page.clips)
        page.find("#prompt").send_keys(" and right")
        page.find("#generate").click()
        second = page.others(first)
        page.write("#prompt", "")
        page.find("#generate").click()
        page.wait(lambda: page.find("#fault").text == "prompt is empty; describe what the clip shows")
        assert page.clips() == second  # those that were there stay
        width = "return [document.documentElement.scrollWidth, innerWidth]"
        driver.set_window_size(500, 800)
        needed, there = driver.execute_script(width)
        assert needed <= there
        assert not faults(driver)
    page.find("#new-seed").click()
    page.write("#prompt", "a two")
    page.find("#generate").click()
    page.wait(lambda: page.find("#fault").text == "The server does not answer; is the program still running?")
