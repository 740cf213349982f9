#!/bin/sh
# Limits and dead-lettering for the orchestrator's queues, as RabbitMQ policies. Safe to repeat.
#
#   sudo deploy/rabbitmq/policies.sh                    on a node of the broker
#   VHOST=crawling TASKS_MAX=200000 deploy/rabbitmq/policies.sh
#   docker compose -f deploy/docker/compose.yaml exec -T rabbitmq sh -s <deploy/rabbitmq/policies.sh
#
# Why policies. The orchestrator declares its queues durable and WITHOUT arguments, so that any plain Celery client
# that declares them by name matches (RabbitMQ compares arguments and answers 406 if they differ). So whatever else a
# queue should have is said here, and can be changed on a running broker without deleting anything.
#
# What it does:
#   1. makes the vhost, if there is none, with QUEUE_TYPE as its default queue type, if that is set;
#   2. orchestrator.analysis and orchestrator.crawl: a length limit, a delivery limit, dead letters to orchestrator.dead;
#   3. extraction_queue: the same.
# orchestrator.dead itself gets no limit on purpose: what stands there is waiting for a person. Alert on its depth.
set -eu

VHOST=${VHOST:-/}
RABBITMQCTL=${RABBITMQCTL:-rabbitmqctl}

# Where the Extractor's messages stand (ORCHESTRATOR_EXTRACTION_QUEUE), and where those go that it rejects or that come
# back too often. orchestrator.dead exists wherever a worker has started; another queue must be declared by somebody.
EXTRACTION_QUEUE=${EXTRACTION_QUEUE:-extraction_queue}
EXTRACTION_DEAD=${EXTRACTION_DEAD:-orchestrator.dead}

# A full queue answers a publish with a nack (reject-publish); nothing that stands in it is ever dropped (drop-head,
# RabbitMQ's default). The orchestrator takes that as "wait": the run is `retrying` with code message_refused until
# there is room. A Celery client notices only with broker_transport_options = {"confirm_publish": True}.
# The limits are soft: a burst that is under way may exceed them.
TASKS_MAX=${TASKS_MAX:-1000000}
EXTRACTION_MAX=${EXTRACTION_MAX:-1000000}

# Quorum queues only: a message that came back more often than this is dead-lettered. A quorum queue with a delivery
# limit and NO dead-letter exchange drops such messages, and since RabbitMQ 4.0 there is a limit of 20 by default. So
# never set the one without the other. A task message comes back when its worker dies, and once every two minutes
# while PostgreSQL is away: 500 bridge more than half a day.
TASKS_DELIVERIES=${TASKS_DELIVERIES:-500}
EXTRACTION_DELIVERIES=${EXTRACTION_DELIVERIES:-100}

# A queue's type is fixed when it is declared and cannot be set by policy; it is the vhost's default type that decides.
# That has to be chosen before the first worker starts, here or by `rabbitmqctl update_vhost_metadata` (3.12 or newer).
# Leave it unset for the broker's default.
QUEUE_TYPE=${QUEUE_TYPE:-}

if ! "$RABBITMQCTL" --quiet list_vhosts name | grep -qxF "$VHOST"; then
    if [ -n "$QUEUE_TYPE" ]; then
        "$RABBITMQCTL" add_vhost "$VHOST" --default-queue-type "$QUEUE_TYPE"
    else
        "$RABBITMQCTL" add_vhost "$VHOST"
    fi
    echo "vhost $VHOST is new: give its users their rights with rabbitmqctl set_permissions" >&2
fi

# The name as a regular expression.
# shellcheck disable=SC2016  # the dollar sign is meant
literally() {
    printf '%s' "$1" | sed 's/[][\.*^$()+?{}|]/\\&/g'
}

# policy NAME PATTERN MAX_LENGTH DELIVERIES DEAD_QUEUE
#
# dead-letter-exchange "" is the default exchange: the routing key is the queue's name. With at-least-once a quorum
# queue keeps a dead letter until the other queue has confirmed it; it needs reject-publish. Classic queues ignore
# delivery-limit and dead-letter-strategy.
policy() {
    "$RABBITMQCTL" set_policy --vhost "$VHOST" --apply-to queues --priority 10 "$1" "$2" "{
        \"max-length\": $3,
        \"overflow\": \"reject-publish\",
        \"delivery-limit\": $4,
        \"dead-letter-exchange\": \"\",
        \"dead-letter-routing-key\": \"$5\",
        \"dead-letter-strategy\": \"at-least-once\"
    }"
}

# Only one policy applies to a queue, the one of the highest priority: if yours match these queues too, merge them.
policy orchestrator-tasks '^orchestrator\.(analysis|crawl)$' "$TASKS_MAX" "$TASKS_DELIVERIES" orchestrator.dead
policy orchestrator-extraction "^$(literally "$EXTRACTION_QUEUE")\$" \
    "$EXTRACTION_MAX" "$EXTRACTION_DELIVERIES" "$EXTRACTION_DEAD"

"$RABBITMQCTL" --quiet list_policies --vhost "$VHOST"
