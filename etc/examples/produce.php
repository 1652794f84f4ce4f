<?php
// A producer in PHP: what it pushes onto a plain Redis list, a daemon does whose script declares the task.
//
//     php etc/examples/produce.php 127.0.0.1 6379 a@b.c "hello from PHP"
//     php etc/examples/produce.php /run/redis/redis.sock 0 a@b.c "hello from PHP"
//
// The list has the name of the queue; see etc/examples/mailer.py.

[, $host, $port, $to, $text] = $argv;
$redis = new Redis();
$redis->connect($host, (int) $port);
$redis->lPush("mail", json_encode([
    "worker" => "mail",
    "class" => "send_mail",
    "params" => ["to" => $to, "text" => $text],
], JSON_THROW_ON_ERROR | JSON_UNESCAPED_UNICODE));
echo "pushed\n";
