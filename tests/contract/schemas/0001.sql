-- A database of silotune 0.1.0 (schema 0001), as that version wrote it: one job that is complete, one in the middle of
-- round 1, sites in every state. Both engines understand it; see test_migrations.py for the one type that differs.

CREATE TABLE alembic_version (
    version_num VARCHAR(32) NOT NULL,
    CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);

CREATE TABLE sites (
    name VARCHAR(63) NOT NULL,
    role VARCHAR(16) NOT NULL,
    state VARCHAR(16) NOT NULL,
    enrolled_unix_seconds FLOAT NOT NULL,
    certificate_serial VARCHAR(64) NOT NULL,
    certificate_expires_unix_seconds FLOAT NOT NULL,
    last_seen_unix_seconds FLOAT NOT NULL,
    agent JSON NOT NULL,
    CONSTRAINT pk_sites PRIMARY KEY (name)
);

CREATE TABLE invitations (
    secret_hash VARCHAR(64) NOT NULL,
    name VARCHAR(63) NOT NULL,
    role VARCHAR(16) NOT NULL,
    expires_unix_seconds FLOAT NOT NULL,
    used_by_key VARCHAR(64) NOT NULL,
    CONSTRAINT pk_invitations PRIMARY KEY (secret_hash)
);

CREATE TABLE jobs (
    id VARCHAR(80) NOT NULL,
    submit_token VARCHAR(128),
    spec TEXT NOT NULL,
    state VARCHAR(16) NOT NULL,
    sentence TEXT NOT NULL,
    base_digest VARCHAR(64) NOT NULL,
    head_version BIGINT,
    best_version BIGINT,
    service_seconds FLOAT NOT NULL,
    created_unix_seconds FLOAT NOT NULL,
    revision BIGINT NOT NULL,
    CONSTRAINT pk_jobs PRIMARY KEY (id),
    CONSTRAINT uq_jobs_submit_token UNIQUE (submit_token)
);

CREATE TABLE uploads (
    owner VARCHAR(63) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    CONSTRAINT pk_uploads PRIMARY KEY (owner, digest)
);

CREATE TABLE events (
    id INTEGER NOT NULL,
    unix_seconds FLOAT NOT NULL,
    job_id VARCHAR(80) NOT NULL,
    round BIGINT NOT NULL,
    sentence TEXT NOT NULL,
    CONSTRAINT pk_events PRIMARY KEY (id)
);

CREATE TABLE commands (
    job_id VARCHAR(80) NOT NULL,
    round BIGINT NOT NULL,
    generation BIGINT NOT NULL,
    state VARCHAR(16) NOT NULL,
    contributions JSON NOT NULL,
    queued_at FLOAT NOT NULL,
    digest VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    optimizer_digest VARCHAR(64) NOT NULL,
    error TEXT NOT NULL,
    corrupt_site VARCHAR(63) NOT NULL,
    seconds JSON NOT NULL,
    CONSTRAINT pk_commands PRIMARY KEY (job_id, round),
    CONSTRAINT fk_commands_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE evaluations (
    job_id VARCHAR(80) NOT NULL,
    version BIGINT NOT NULL,
    site VARCHAR(63) NOT NULL,
    split VARCHAR(16) NOT NULL,
    examples BIGINT NOT NULL,
    metrics JSON NOT NULL,
    seconds JSON NOT NULL,
    CONSTRAINT pk_evaluations PRIMARY KEY (job_id, version, site, split),
    CONSTRAINT fk_evaluations_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE files (
    job_id VARCHAR(80) NOT NULL,
    name VARCHAR(200) NOT NULL,
    digest VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    CONSTRAINT pk_files PRIMARY KEY (job_id, name),
    CONSTRAINT fk_files_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE rounds (
    job_id VARCHAR(80) NOT NULL,
    number BIGINT NOT NULL,
    attempt INTEGER NOT NULL,
    phase VARCHAR(16) NOT NULL,
    cohort JSON NOT NULL,
    opened_at FLOAT NOT NULL,
    deadline_at FLOAT NOT NULL,
    collecting_at FLOAT,
    aggregating_at FLOAT,
    ended_at FLOAT,
    sentence TEXT NOT NULL,
    CONSTRAINT pk_rounds PRIMARY KEY (job_id, number),
    CONSTRAINT fk_rounds_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE standings (
    job_id VARCHAR(80) NOT NULL,
    site VARCHAR(63) NOT NULL,
    failures_in_a_row INTEGER NOT NULL,
    set_aside BOOLEAN NOT NULL,
    reason TEXT NOT NULL,
    CONSTRAINT pk_standings PRIMARY KEY (job_id, site),
    CONSTRAINT fk_standings_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE tasks (
    id VARCHAR(200) NOT NULL,
    job_id VARCHAR(80) NOT NULL,
    round BIGINT NOT NULL,
    kind VARCHAR(16) NOT NULL,
    site VARCHAR(63) NOT NULL,
    version BIGINT NOT NULL,
    split VARCHAR(16) NOT NULL,
    state VARCHAR(16) NOT NULL,
    generation BIGINT NOT NULL,
    queued_at FLOAT NOT NULL,
    lease_until FLOAT NOT NULL,
    last_progress_at FLOAT NOT NULL,
    failures INTEGER NOT NULL,
    progress JSON NOT NULL,
    reason TEXT NOT NULL,
    bytes_up BIGINT NOT NULL,
    bytes_down BIGINT NOT NULL,
    result JSON NOT NULL,
    CONSTRAINT pk_tasks PRIMARY KEY (id),
    CONSTRAINT fk_tasks_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE updates (
    job_id VARCHAR(80) NOT NULL,
    round BIGINT NOT NULL,
    site VARCHAR(63) NOT NULL,
    fate VARCHAR(16) NOT NULL,
    reason TEXT NOT NULL,
    digest VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    examples BIGINT NOT NULL,
    steps BIGINT NOT NULL,
    metrics JSON NOT NULL,
    seconds JSON NOT NULL,
    CONSTRAINT pk_updates PRIMARY KEY (job_id, round, site),
    CONSTRAINT fk_updates_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE TABLE versions (
    job_id VARCHAR(80) NOT NULL,
    version BIGINT NOT NULL,
    digest VARCHAR(64) NOT NULL,
    size BIGINT NOT NULL,
    optimizer_digest VARCHAR(64) NOT NULL,
    contributions JSON NOT NULL,
    committed_unix_seconds FLOAT NOT NULL,
    CONSTRAINT pk_versions PRIMARY KEY (job_id, version),
    CONSTRAINT fk_versions_job_id_jobs FOREIGN KEY(job_id) REFERENCES jobs (id)
);

CREATE INDEX ix_events_job_id ON events (job_id);
CREATE INDEX ix_files_digest ON files (digest);
CREATE INDEX ix_tasks_job_round ON tasks (job_id, round);
CREATE INDEX ix_tasks_site_state ON tasks (site, state);
CREATE INDEX ix_updates_digest ON updates (digest);
CREATE INDEX ix_versions_digest ON versions (digest);

INSERT INTO alembic_version (version_num) VALUES
    ('0001');

INSERT INTO sites (name, role, state, enrolled_unix_seconds, certificate_serial, certificate_expires_unix_seconds, last_seen_unix_seconds, agent) VALUES
    ('oslo', 'site', 'ENROLLED', 1000000.0, '1', 10000000.0, 1000000.0, '{"version": "1"}'),
    ('bergen', 'site', 'ENROLLED', 1000000.0, '4f4f4f4f4f4f4f4f', 10000000.0, 1000005.0, '{"version": "0.1.0", "device": "cuda", "gpus": [{"name": "H200", "memory_bytes": "150000000000"}]}'),
    ('tromso', 'site', 'ENROLLED', 1000000.0, '4f4f4f4f4f4f4f4f', 10000000.0, 1000005.0, '{"version": "0.1.0", "device": "cuda", "gpus": [{"name": "H200", "memory_bytes": "150000000000"}]}'),
    ('hq', 'house', 'ENROLLED', 1000000.0, '1', 10000000.0, 1000000.0, '{"version": "1"}'),
    ('molde', 'site', 'INVITED', 0.0, '', 0.0, 0.0, '{}'),
    ('voss', 'site', 'REVOKED', 1000000.0, '1', 10000000.0, 1000000.0, '{"version": "1"}');

INSERT INTO invitations (secret_hash, name, role, expires_unix_seconds, used_by_key) VALUES
    ('secret of oslo', 'oslo', 'site', 1000060.0, 'key'),
    ('be0a067988ef2f155c670d835f1e13ae7f154aaaa473d14fb74a1142b73dec19', 'bergen', 'site', 1000060.0, 'b11a4b392057b5a085a69ed74310093f9c9456955be682516e3482354016af95'),
    ('c31ae830aed0fd62b09bdb09e0d0856e5875a287e3c19b6335e7ac5fb81ef6b2', 'tromso', 'site', 1000060.0, '02f555a0ac3e25c80b8d3c1a4d3605472ee649bdad1ac7a9e45a7c0ea3671188'),
    ('secret of hq', 'hq', 'house', 1000060.0, 'key'),
    ('f2d323bf4f6b5eb75b9c86325be83e7a5769c13049a6cd4c9d17d26872f7e643', 'molde', 'site', 1003600.0, ''),
    ('secret of voss', 'voss', 'site', 1000060.0, 'key');

INSERT INTO jobs (id, submit_token, spec, state, sentence, base_digest, head_version, best_version, service_seconds, created_unix_seconds, revision) VALUES
    ('done-1', 'first', '{"aggregation":{"max_share":1.0,"rule":"mean","server_optimizer":{"type":"none"},"weights":"examples"},"base_model":null,"cohort":{"gather_seconds":0.0,"quorum":2,"retries":2,"round_deadline_seconds":100.0,"sites":"all","size":"all","stall_limit_seconds":30.0},"data":null,"evaluation":{"deadline_seconds":3600.0,"early_stop":0,"every":1,"metric":"accuracy","test":false,"where":["house"]},"local":{"batch_size":32,"epochs":null,"learning_rate":2e-05,"max_gradient_norm":null,"micro_batch_size":null,"momentum":0.0,"optimizer":"adamw","precision":"auto","schedule":{"final":0.1,"type":"constant"},"steps":1,"weight_decay":0.0},"method":{"freeze_embeddings":false,"type":"full"},"name":"done","rounds":2,"seed":0,"task":{"noise":0.001,"payload_mb":1.0,"train_seconds":0.0,"type":"synthetic"}}', 'COMPLETED', 'job done is complete: all 2 rounds are done', 'de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d', 2, NULL, 227.0, 1000000.0, 21),
    ('open-1', NULL, '{"aggregation":{"max_share":1.0,"rule":"mean","server_optimizer":{"type":"none"},"weights":"examples"},"base_model":null,"cohort":{"gather_seconds":0.0,"quorum":2,"retries":2,"round_deadline_seconds":100.0,"sites":"all","size":"all","stall_limit_seconds":30.0},"data":null,"evaluation":{"deadline_seconds":3600.0,"early_stop":0,"every":1,"metric":"accuracy","test":false,"where":["house"]},"local":{"batch_size":32,"epochs":null,"learning_rate":2e-05,"max_gradient_norm":null,"micro_batch_size":null,"momentum":0.0,"optimizer":"adamw","precision":"auto","schedule":{"final":0.1,"type":"constant"},"steps":1,"weight_decay":0.0},"method":{"freeze_embeddings":false,"type":"full"},"name":"open","rounds":3,"seed":0,"task":{"noise":0.001,"payload_mb":1.0,"train_seconds":0.0,"type":"synthetic"}}', 'RUNNING', 'round 1 begins with bergen, oslo, tromso', 'de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d', 0, NULL, 3.25, 1000100.0, 7);

INSERT INTO uploads (owner, digest, size) VALUES
    ('hq', '5e6af741a9e29389cb16a8263de9345ed127abc79ed976543561c335c48aa02c', 80),
    ('hq', 'b756e64ea90c4036e88f3f07ff9a708666dc0527bf14a015249e84ff6daabaa7', 2),
    ('bergen', '03a061dda31049a1a9a2311daf56771d3307fd65843ca864f00c87883f87a008', 80),
    ('oslo', '2fa873141dbb612482d4310a71ede2f1000e6b994a6421bc12f34bcf7f8c6691', 80),
    ('bergen', '0b4ffb378415a5b4d0f3f6dcbff112f82e06bae304c5f051fa61948e407c582d', 80),
    ('oslo', 'eae6183dafa9b620c234386432ac9b6510be0f0ee5afe4f21eeb7f360301e901', 80),
    ('hq', '7e13f72210b92697195db84500843a7e46fe8a4036bc5fc3ae263ea908069053', 80),
    ('oslo', '45a88a6d9605cf78de62536098188bfbb18d1e299f1c79333c9580efadf59685', 80);

INSERT INTO events (unix_seconds, job_id, round, sentence) VALUES
    (1000000.0, 'done-1', 0, 'job done was submitted'),
    (1000000.0, 'done-1', 0, 'job done begins: version 0 has to be made'),
    (1000000.0, 'done-1', 0, 'hq makes version 0'),
    (1000000.0, 'done-1', 0, 'version 0 by hq is the head'),
    (1000000.0, 'done-1', 1, 'round 1 opens'),
    (1000000.0, 'done-1', 1, 'round 1 begins with bergen, oslo, tromso'),
    (1000000.0, 'done-1', 1, 'round 1 aggregates 2 updates'),
    (1000000.0, 'done-1', 1, 'round 1 is committed: version 1 from 2 updates'),
    (1000000.0, 'done-1', 2, 'round 2 opens'),
    (1000000.0, 'done-1', 2, 'round 2 begins with bergen, oslo'),
    (1000000.0, 'done-1', 2, 'round 2 aggregates 2 updates'),
    (1000000.0, 'done-1', 2, 'round 2 is committed: version 2 from 2 updates'),
    (1000000.0, 'done-1', 2, 'job done is complete: all 2 rounds are done'),
    (1000100.0, 'open-1', 0, 'job open was submitted'),
    (1000000.0, 'open-1', 0, 'job open begins: version 0 has to be made'),
    (1000000.0, 'open-1', 0, 'hq makes version 0'),
    (1000000.0, 'open-1', 0, 'version 0 by hq is the head'),
    (1000000.0, 'open-1', 1, 'round 1 opens'),
    (1000000.0, 'open-1', 1, 'round 1 begins with bergen, oslo, tromso');

INSERT INTO commands (job_id, round, generation, state, contributions, queued_at, digest, size, optimizer_digest, error, corrupt_site, seconds) VALUES
    ('done-1', 1, 1, 'DONE', '[{"site": "bergen", "digest": "03a061dda31049a1a9a2311daf56771d3307fd65843ca864f00c87883f87a008", "size": 80, "weight": 0.75}, {"site": "oslo", "digest": "2fa873141dbb612482d4310a71ede2f1000e6b994a6421bc12f34bcf7f8c6691", "size": 80, "weight": 0.25}]', 12.5, 'c08844c9b74969f28413a83f67ea6877d89a3af70a6fa68172efc5eb631cc5c5', 80, '', '', '', '{"combine": 0.5}'),
    ('done-1', 2, 1, 'DONE', '[{"site": "bergen", "digest": "0b4ffb378415a5b4d0f3f6dcbff112f82e06bae304c5f051fa61948e407c582d", "size": 80, "weight": 0.75}, {"site": "oslo", "digest": "eae6183dafa9b620c234386432ac9b6510be0f0ee5afe4f21eeb7f360301e901", "size": 80, "weight": 0.25}]', 126.0, '59e823f0c350c99d1569eba8a7645c0a71eb951302ccb54770197b299bd355c1', 80, '', '', '', '{"combine": 0.5}');

INSERT INTO evaluations (job_id, version, site, split, examples, metrics, seconds) VALUES
    ('done-1', 0, 'hq', 'validation', 50, '{"loss": 0.5}', '{"evaluate": 0.5}'),
    ('done-1', 1, 'hq', 'validation', 50, '{"loss": 0.4}', '{"evaluate": 0.5}'),
    ('done-1', 2, 'hq', 'validation', 50, '{"loss": 0.3}', '{"evaluate": 0.5}');

INSERT INTO files (job_id, name, digest, size) VALUES
    ('done-1', 'config.json', 'b756e64ea90c4036e88f3f07ff9a708666dc0527bf14a015249e84ff6daabaa7', 2),
    ('open-1', 'config.json', 'b756e64ea90c4036e88f3f07ff9a708666dc0527bf14a015249e84ff6daabaa7', 2);

INSERT INTO rounds (job_id, number, attempt, phase, cohort, opened_at, deadline_at, collecting_at, aggregating_at, ended_at, sentence) VALUES
    ('done-1', 0, 1, 'COMMITTED', '["hq"]', 0.0, 100.0, 0.0, NULL, 0.0, 'version 0 by hq is the head'),
    ('done-1', 1, 1, 'COMMITTED', '["bergen", "oslo", "tromso"]', 0.0, 100.0, 0.0, 12.5, 113.5, 'round 1 is committed: version 1 from 2 updates'),
    ('done-1', 2, 1, 'COMMITTED', '["bergen", "oslo"]', 113.5, 213.5, 113.5, 126.0, 227.0, 'job done is complete: all 2 rounds are done'),
    ('open-1', 0, 1, 'COMMITTED', '["hq"]', 0.0, 100.0, 0.0, NULL, 0.0, 'version 0 by hq is the head'),
    ('open-1', 1, 1, 'COLLECTING', '["bergen", "oslo", "tromso"]', 0.0, 100.0, 0.0, NULL, NULL, 'round 1 begins with bergen, oslo, tromso');

INSERT INTO standings (job_id, site, failures_in_a_row, set_aside, reason) VALUES
    ('done-1', 'tromso', 1, '1', 'the policy allows no job named done');

INSERT INTO tasks (id, job_id, round, kind, site, version, split, state, generation, queued_at, lease_until, last_progress_at, failures, progress, reason, bytes_up, bytes_down, result) VALUES
    ('done-1.0.init.hq', 'done-1', 0, 'INIT', 'hq', 0, '', 'SUCCEEDED', 1, 0.0, 30.0, 0.0, 0, '{}', '', 0, 0, '{"digest": "5e6af741a9e29389cb16a8263de9345ed127abc79ed976543561c335c48aa02c", "size": 80, "base_digest": "de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d"}'),
    ('done-1.0.evaluate.hq.validation', 'done-1', 0, 'EVALUATE', 'hq', 0, 'validation', 'SUCCEEDED', 1, 0.0, 143.5, 0.0, 0, '{}', '', 0, 0, '{}'),
    ('done-1.1.train.bergen', 'done-1', 1, 'TRAIN', 'bergen', 0, '', 'SUCCEEDED', 1, 0.0, 30.0, 0.0, 0, '{"stage": "TRAINING", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}', '', 80, 80, '{}'),
    ('done-1.1.train.oslo', 'done-1', 1, 'TRAIN', 'oslo', 0, '', 'SUCCEEDED', 1, 0.0, 30.0, 0.0, 0, '{"stage": "TRAINING", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}', '', 80, 80, '{}'),
    ('done-1.1.train.tromso', 'done-1', 1, 'TRAIN', 'tromso', 0, '', 'DECLINED', 1, 0.0, 30.0, 0.0, 1, '{}', 'the policy allows no job named done', 0, 0, '{}'),
    ('done-1.1.evaluate.hq.validation', 'done-1', 1, 'EVALUATE', 'hq', 1, 'validation', 'SUCCEEDED', 1, 113.5, 143.5, 113.5, 0, '{}', '', 0, 0, '{}'),
    ('done-1.2.train.bergen', 'done-1', 2, 'TRAIN', 'bergen', 1, '', 'SUCCEEDED', 1, 113.5, 143.5, 113.5, 0, '{"stage": "TRAINING", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}', '', 80, 80, '{}'),
    ('done-1.2.train.oslo', 'done-1', 2, 'TRAIN', 'oslo', 1, '', 'SUCCEEDED', 1, 113.5, 143.5, 113.5, 0, '{"stage": "TRAINING", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}', '', 80, 80, '{}'),
    ('done-1.2.evaluate.hq.validation', 'done-1', 2, 'EVALUATE', 'hq', 2, 'validation', 'SUCCEEDED', 1, 227.0, 257.0, 227.0, 0, '{}', '', 0, 0, '{}'),
    ('open-1.0.init.hq', 'open-1', 0, 'INIT', 'hq', 0, '', 'SUCCEEDED', 1, 0.0, 30.0, 0.0, 0, '{}', '', 0, 0, '{"digest": "7e13f72210b92697195db84500843a7e46fe8a4036bc5fc3ae263ea908069053", "size": 80, "base_digest": "de8f3fcf327eb911b2c368e011e0ffdee22fed456b4f4508337018ba46a0639d"}'),
    ('open-1.0.evaluate.hq.validation', 'open-1', 0, 'EVALUATE', 'hq', 0, 'validation', 'QUEUED', 0, 0.0, 0.0, 0.0, 0, '{}', '', 0, 0, '{}'),
    ('open-1.1.train.bergen', 'open-1', 1, 'TRAIN', 'bergen', 0, '', 'RUNNING', 1, 0.0, 33.25, 3.25, 0, '{"stage": "UPLOADING", "done": 40, "total": 80, "unit": "bytes", "metrics": {}}', '', 0, 0, '{}'),
    ('open-1.1.train.oslo', 'open-1', 1, 'TRAIN', 'oslo', 0, '', 'SUCCEEDED', 1, 0.0, 30.0, 0.0, 0, '{"stage": "TRAINING", "done": 3, "total": 9, "unit": "steps", "metrics": {"loss": 0.5}}', '', 80, 80, '{}'),
    ('open-1.1.train.tromso', 'open-1', 1, 'TRAIN', 'tromso', 0, '', 'QUEUED', 0, 0.0, 0.0, 0.0, 0, '{}', '', 0, 0, '{}');

INSERT INTO updates (job_id, round, site, fate, reason, digest, size, examples, steps, metrics, seconds) VALUES
    ('done-1', 1, 'bergen', 'ACCEPTED', '', '03a061dda31049a1a9a2311daf56771d3307fd65843ca864f00c87883f87a008', 80, 30, 9, '{"loss": 0.25}', '{"train": 1.5}'),
    ('done-1', 1, 'oslo', 'ACCEPTED', '', '2fa873141dbb612482d4310a71ede2f1000e6b994a6421bc12f34bcf7f8c6691', 80, 10, 9, '{"loss": 0.25}', '{"train": 1.5}'),
    ('done-1', 2, 'bergen', 'ACCEPTED', '', '0b4ffb378415a5b4d0f3f6dcbff112f82e06bae304c5f051fa61948e407c582d', 80, 30, 9, '{"loss": 0.25}', '{"train": 1.5}'),
    ('done-1', 2, 'oslo', 'ACCEPTED', '', 'eae6183dafa9b620c234386432ac9b6510be0f0ee5afe4f21eeb7f360301e901', 80, 10, 9, '{"loss": 0.25}', '{"train": 1.5}'),
    ('open-1', 1, 'oslo', 'ACCEPTED', '', '45a88a6d9605cf78de62536098188bfbb18d1e299f1c79333c9580efadf59685', 80, 10, 9, '{"loss": 0.25}', '{"train": 1.5}');

INSERT INTO versions (job_id, version, digest, size, optimizer_digest, contributions, committed_unix_seconds) VALUES
    ('done-1', 0, '5e6af741a9e29389cb16a8263de9345ed127abc79ed976543561c335c48aa02c', 80, '', '[{"site": "hq", "digest": "5e6af741a9e29389cb16a8263de9345ed127abc79ed976543561c335c48aa02c", "size": 80, "weight": 1.0}]', 1000000.0),
    ('done-1', 1, 'c08844c9b74969f28413a83f67ea6877d89a3af70a6fa68172efc5eb631cc5c5', 80, '', '[{"site": "bergen", "digest": "03a061dda31049a1a9a2311daf56771d3307fd65843ca864f00c87883f87a008", "size": 80, "weight": 0.75}, {"site": "oslo", "digest": "2fa873141dbb612482d4310a71ede2f1000e6b994a6421bc12f34bcf7f8c6691", "size": 80, "weight": 0.25}]', 1000000.0),
    ('done-1', 2, '59e823f0c350c99d1569eba8a7645c0a71eb951302ccb54770197b299bd355c1', 80, '', '[{"site": "bergen", "digest": "0b4ffb378415a5b4d0f3f6dcbff112f82e06bae304c5f051fa61948e407c582d", "size": 80, "weight": 0.75}, {"site": "oslo", "digest": "eae6183dafa9b620c234386432ac9b6510be0f0ee5afe4f21eeb7f360301e901", "size": 80, "weight": 0.25}]', 1000000.0),
    ('open-1', 0, '7e13f72210b92697195db84500843a7e46fe8a4036bc5fc3ae263ea908069053', 80, '', '[{"site": "hq", "digest": "7e13f72210b92697195db84500843a7e46fe8a4036bc5fc3ae263ea908069053", "size": 80, "weight": 1.0}]', 1000000.0);
