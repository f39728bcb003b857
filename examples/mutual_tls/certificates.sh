#!/bin/sh
# certificates.sh DIR: an authority, and what it certifies: a server, an agent and an operator.
set -eu
mkdir -p "$1"
cd "$1"

certify() { # FILE NAMES USAGE
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
        -subj "/CN=$1" -keyout "$1.key" -out "$1.csr" 2>/dev/null
    printf '%s\n' "subjectAltName=$2" "extendedKeyUsage=$3" \
        "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
        "authorityKeyIdentifier=keyid" "subjectKeyIdentifier=hash" > "$1.ext"
    openssl x509 -req -in "$1.csr" -CA authority.pem -CAkey authority.key -CAcreateserial \
        -days 30 -extfile "$1.ext" -out "$1.pem" 2>/dev/null
    rm "$1.csr" "$1.ext"
}

openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 \
    -subj "/CN=fleet authority" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout authority.key -out authority.pem 2>/dev/null
certify server "DNS:localhost,IP:127.0.0.1" serverAuth
certify agent "DNS:laptop-7.agent.fleet.example" clientAuth
certify operator "DNS:olga.operator.fleet.example" clientAuth
