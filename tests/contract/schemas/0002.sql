-- What schema 0002 has beyond 0001.sql, and the same database after that version has worked with it: oslo's certificate
-- was seen again, the last version of done-1 was judged and its first one deleted, a replica drives open-1, bergen's
-- update was handed in. Both engines understand it.

UPDATE alembic_version SET version_num = '0002';

CREATE TABLE federation (
    name VARCHAR(63) NOT NULL,
    value TEXT NOT NULL,
    CONSTRAINT pk_federation PRIMARY KEY (name)
);
ALTER TABLE jobs ADD COLUMN driver VARCHAR(63) DEFAULT '' NOT NULL;
ALTER TABLE jobs ADD COLUMN driver_generation BIGINT DEFAULT '0' NOT NULL;
ALTER TABLE jobs ADD COLUMN driver_beats BIGINT DEFAULT '0' NOT NULL;
ALTER TABLE sites ADD COLUMN calls BIGINT DEFAULT '0' NOT NULL;
ALTER TABLE versions ADD COLUMN deleted BOOLEAN DEFAULT '0' NOT NULL;
ALTER TABLE versions ADD COLUMN unjudged BOOLEAN DEFAULT '0' NOT NULL;
ALTER TABLE uploads ADD COLUMN recorded BOOLEAN DEFAULT '0' NOT NULL;
CREATE INDEX ix_versions_unjudged ON versions (job_id) WHERE unjudged;
CREATE INDEX ix_versions_kept ON versions (job_id, version) WHERE NOT deleted;
CREATE INDEX ix_tasks_open ON tasks (job_id, site) WHERE state IN ('QUEUED', 'LEASED', 'RUNNING');
CREATE INDEX ix_uploads_digest ON uploads (digest);
CREATE INDEX ix_versions_optimizer_digest ON versions (optimizer_digest);

INSERT INTO federation (name, value) VALUES ('blobs', 'file:/var/lib/silotune/blobs');
UPDATE sites SET calls = 4711 WHERE name = 'oslo';
UPDATE jobs SET driver = 'north' WHERE id = 'open-1';
UPDATE jobs SET driver_beats = 5000000000 WHERE id = 'done-1';
UPDATE versions SET deleted = '1' WHERE job_id = 'done-1' AND version = 0;
UPDATE versions SET unjudged = '1' WHERE job_id = 'open-1';
UPDATE versions SET optimizer_digest = 'f15acc02c350c99d1569eba8a7645c0a71eb951302ccb54770197b299bd355c1'
    WHERE job_id = 'open-1';
UPDATE uploads SET recorded = '1' WHERE owner = 'oslo';
