-- Two roles for the orchestrator: one that migrates, one that works.
--
--   owner     owns the ledger's schema. `orchestrator migrate` runs as this role, nothing else does.
--   runtime   workers, beat, API and command line. It reads the application's two tables and cannot change them;
--             it reads and writes the ledger's rows and cannot change its tables.
--
-- Neither is a superuser. Create them first, with passwords of your own:
--
--   CREATE ROLE orchestrator_owner   LOGIN PASSWORD '…';
--   CREATE ROLE orchestrator_runtime LOGIN PASSWORD '…';
--
-- Then run this file in the application's database, before the first `orchestrator migrate`, as a superuser (or as
-- the owner of the database and of both tables who is also a member of the owner role). It may be run again at any
-- time. Later migrations need no further grants: default privileges see to that.
--
--   psql "$ADMIN_URL" -v ON_ERROR_STOP=1 -f deploy/postgresql/grants.sql
--
-- Every name below is a variable: add `-v runtime=crawler`, for instance. `-v queues=on` for set-ups whose queues
-- live in PostgreSQL (PGMQ): part 3.

\if :{?owner} \else \set owner orchestrator_owner \endif
\if :{?runtime} \else \set runtime orchestrator_runtime \endif
\if :{?schema} \else \set schema orchestrator \endif
\if :{?app_schema} \else \set app_schema public \endif
\if :{?crawl_tasks} \else \set crawl_tasks crawl_tasks \endif
\if :{?crawl_configs} \else \set crawl_configs crawl_configs \endif
\if :{?queues} \else \set queues off \endif

BEGIN;

-- 1. The application's tables: SELECT, and nothing else.
--    (Up to PostgreSQL 14 every role may create tables in schema public: REVOKE CREATE ON SCHEMA public FROM PUBLIC.)
GRANT USAGE ON SCHEMA :"app_schema" TO :"runtime";
GRANT SELECT ON :"app_schema".:"crawl_tasks", :"app_schema".:"crawl_configs" TO :"runtime";

-- 2. The ledger: the owner's tables, the runtime's rows.
CREATE SCHEMA IF NOT EXISTS :"schema" AUTHORIZATION :"owner";
GRANT USAGE ON SCHEMA :"schema" TO :"runtime";
--    What migrations will create …
ALTER DEFAULT PRIVILEGES FOR ROLE :"owner" IN SCHEMA :"schema"
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO :"runtime";
ALTER DEFAULT PRIVILEGES FOR ROLE :"owner" IN SCHEMA :"schema" GRANT USAGE ON SEQUENCES TO :"runtime";
--    … and what they have created already.
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA :"schema" TO :"runtime";
GRANT USAGE ON ALL SEQUENCES IN SCHEMA :"schema" TO :"runtime";

\if :queues
-- 3. Queues in PostgreSQL (PGMQ, plain SQL in schema pgmq). Leave this out when RabbitMQ carries them.
--    The owner installs PGMQ, whose script asks for the right to create schemas even where pgmq exists. It is
--    needed by the first `orchestrator migrate` only: REVOKE it afterwards if you like.
SELECT current_database() AS database \gset
GRANT CREATE ON DATABASE :"database" TO :"owner";
CREATE SCHEMA IF NOT EXISTS pgmq AUTHORIZATION :"owner";
--    Workers declare queues on every start, which is CREATE TABLE IF NOT EXISTS and CREATE INDEX IF NOT EXISTS, and
--    PostgreSQL wants the table's owner for the latter even when the index is there. So the runtime creates the
--    queues and owns them; do not create them as somebody else. EXECUTE on PGMQ's functions is PUBLIC's by default.
GRANT USAGE, CREATE ON SCHEMA pgmq TO :"runtime";
--    pgmq.meta and pgmq.topic_bindings: the list of queues, and of what is bound to them.
ALTER DEFAULT PRIVILEGES FOR ROLE :"owner" IN SCHEMA pgmq GRANT SELECT, INSERT ON TABLES TO :"runtime";
GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA pgmq TO :"runtime";
--    An Extractor with a role of its own: GRANT USAGE ON SCHEMA pgmq, and SELECT, UPDATE, DELETE ON
--    pgmq.q_extraction_queue (INSERT ON pgmq.a_extraction_queue too if it archives), once the queue exists.
\endif

COMMIT;
