# make demo    everything on real data: phase 1 -> phase 2 -> sample -> evaluate -> runs/demo/report.html
# make test    every test but the long ones        make test-all    the long ones too
# make check   format, lint and types              make tiny        trains the embedded model again
# make docs    the documentation site -> build/site/index.html (warnings are errors)      make links   its external links
# make lock    the versions installed here -> locks/ (make test with them: PIP_CONSTRAINT=locks/py311.txt make test)
# make plans   compiles every large preset for every kind of machine -> runs/plans/ (hours; continues where it stopped)
# make clean   removes .venv, caches, build/, dist/ and runs/

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
WORKDIR ?= runs/demo
WORKERS ?= 2
# The demo's phases are a fourth and a sixteenth as long as the tiny preset's, so their averages look back less far.
SHORT = --config.method.ema=0.98 --config.data.clips=1024 --config.log_every=5 --config.sample_every=50 \
	--config.checkpoint_every=50

# Compiled programs are kept between runs; a second demo or test run skips most of the compiling.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: demo test test-all check format docs links lock tiny plans clean

demo: $(VENV)/installed
	$(RUN) -m vpae_jax.main --config=configs/phase1.py $(SHORT) --config.steps=200 --workdir=$(WORKDIR)/phase1
	$(RUN) -m vpae_jax.main --config=configs/phase2.py $(SHORT) --config.steps=100 --config.method.disc_warmup=20 \
		--workdir=$(WORKDIR)/phase2
	$(RUN) -m vpae_jax.sample --model=$(WORKDIR)/phase2/model --prompt="a three moves up and to the left" \
		--output=$(WORKDIR)/sample.mp4
	$(RUN) -m vpae_jax.evaluate --model=tiny --phase1=$(WORKDIR)/phase1 --phase2=$(WORKDIR)/phase2 --output=$(WORKDIR)
	@echo "open $(WORKDIR)/report.html"

test: $(VENV)/installed-dev
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not long" -q

test-all: $(VENV)/installed-dev
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q

check: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(RUN)

format: $(VENV)/installed-dev
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/installed-dev
	$(RUN) -m sphinx -W --keep-going -q -b html docs build/site
	@echo "open build/site/index.html"

links: $(VENV)/installed-dev
	$(RUN) -m sphinx -q -b linkcheck docs build/site/links

lock: $(VENV)/installed-dev
	mkdir -p locks
	$(RUN) -m pip list --format=freeze --exclude-editable | grep -Ev '^(cuda|nvidia|triton)' | sed 's/+cpu$$//' > \
		locks/py$$($(RUN) -c "import sys; print(f'{sys.version_info[0]}{sys.version_info[1]}')").txt

tiny: $(VENV)/installed
	$(RUN) -m vpae_jax.main --config=configs/vae.py --workdir=runs/tiny/vae
	$(RUN) -m vpae_jax.main --config=configs/encoders.py --workdir=runs/tiny/encoders
	$(RUN) -m vpae_jax.main --config=configs/teacher.py --workdir=runs/tiny/teacher

plans: $(VENV)/installed-dev
	$(RUN) -m vpae_jax.planning.survey --output=runs/plans

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(RUN) -m pip install -q -r requirements-dev.txt
	touch $@

clean:
	rm -rf runs .cache build dist $(VENV)
