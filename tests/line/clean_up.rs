//! Old deletes are forgotten a part at a time, while changes wait.

use crate::stage::{Setting, Stage};

#[tokio::test]
async fn many_old_deletes_are_forgotten_in_bounded_parts_one_right_after_the_other() {
    let stage = Stage::set(Setting::default()).await;
    stage.sql("INSERT INTO t VALUES (1, 'one')").await;
    stage.once().await;
    // A trigger of its own table counts what each statement removes.
    stage
        .target_sql(
            "INSERT INTO millrace.tombstone (relation, key, version, deleted_at)
                 SELECT 'public.t', '9:' || 100000000 + i, '00000000-0000-0000-0000-000000000001', now() - interval '1 hour'
                 FROM generate_series(1, 120000) i;
             CREATE TABLE public.removed (deletes bigint NOT NULL);
             CREATE FUNCTION public.counted() RETURNS trigger LANGUAGE plpgsql AS
                 'BEGIN INSERT INTO public.removed SELECT count(*) FROM gone; RETURN NULL; END';
             CREATE TRIGGER counted AFTER DELETE ON millrace.tombstone REFERENCING OLD TABLE AS gone
                 FOR EACH STATEMENT EXECUTE FUNCTION public.counted()",
        )
        .await;
    let pipeline = stage.start();
    let left = "SELECT count(*)::text FROM millrace.tombstone";
    stage.target_shows(&pipeline, left, "0").await;
    let parts = "SELECT string_agg(deletes::text, ' ' ORDER BY deletes DESC) FROM public.removed WHERE deletes > 0";
    assert_eq!(stage.target_text(parts).await, "50000 50000 20000");
    stage.sql("INSERT INTO t VALUES (2, 'two')").await;
    stage.equal(&pipeline).await;
}
