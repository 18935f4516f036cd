-- The example's table, made when the source is initialised.
CREATE TABLE public.orders (
    id bigint PRIMARY KEY,
    customer_id bigint NOT NULL,
    status text NOT NULL,
    amount numeric(12,2) NOT NULL,
    note text,
    created_at timestamptz NOT NULL DEFAULT now(),
    attributes jsonb
);

INSERT INTO public.orders (id, customer_id, status, amount)
SELECT i, i % 100, 'new', i * 1.25 FROM generate_series(1, 1000) AS i;
