#!/usr/bin/env bash
# Docker's Go client speaks TLS to a Unix socket when it gets an http.Client of its user.
#
# Seen with   github.com/moby/moby/client v0.6.3, Go 1.26
# Behaviour   WithHTTPClient copies the transport of that client. Go's Transport.Clone prepares HTTP/2
#             first, which sets an empty TLSClientConfig in the copy, and the Docker client takes
#             any TLSClientConfig as a sign that it has to use https. So a zero http.Transport
#             is enough, though the host is unix://, and no TLS has been configured anywhere.
#             A transport without HTTP/2 (TLSNextProto is not nil) is not affected.
# Operators   A program that sets a timeout or limits connections by its own transport cannot reach
#             the engine; the error says that the server answered HTTP to an HTTPS client, which
#             looks like a wrong address or a daemon with TLS. WithScheme("http") is the remedy.
# renewd      gives WithScheme("http") with its own transport (internal/agent/attest/docker).
#
# Output seen
#   default client: http, version 28.0.0
#   own http.Transport{}: https, http: server gave HTTP response to HTTPS client
#   own http.Transport{} without HTTP/2: http, version 28.0.0
#   own http.Transport{} and WithScheme("http"): http, version 28.0.0
source "$(dirname "$0")/lib.sh"
go_module github.com/moby/moby/client@v0.6.3
cat >main.go <<'GO'
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"

	"github.com/moby/moby/client"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// scheme notes that of the last request, before the connection is used.
type scheme struct{ last string }

func (s *scheme) note(r *http.Request) error {
	s.last = r.URL.Scheme
	return nil
}

func main() {
	socket := filepath.Join(must(os.Getwd()), "engine.sock")
	engine := http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprint(w, `{"Version":"28.0.0","ApiVersion":"1.51"}`)
		}),
		ErrorLog: log.New(io.Discard, "", 0),
	}
	go engine.Serve(must(net.Listen("unix", socket)))
	withoutHTTP2 := &http.Transport{TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}}
	for _, c := range []struct {
		name string
		opts []client.Opt
	}{
		{"default client", nil},
		{"own http.Transport{}", []client.Opt{client.WithHTTPClient(&http.Client{Transport: &http.Transport{}})}},
		{"own http.Transport{} without HTTP/2", []client.Opt{client.WithHTTPClient(&http.Client{Transport: withoutHTTP2})}},
		{`own http.Transport{} and WithScheme("http")`, []client.Opt{client.WithHTTPClient(&http.Client{Transport: &http.Transport{}}), client.WithScheme("http")}},
	} {
		var s scheme
		cli := must(client.New(append(c.opts, client.WithHost("unix://"+socket), client.WithAPIVersion("1.51"), client.WithHTTPRequestHook(s.note))...))
		version, err := cli.ServerVersion(context.Background(), client.ServerVersionOptions{})
		fmt.Printf("%s: %s, ", c.name, s.last)
		cli.Close()
		if err == nil {
			fmt.Println("version", version.Version)
			continue
		}
		for errors.Unwrap(err) != nil {
			err = errors.Unwrap(err)
		}
		fmt.Println(err)
	}
}
GO
go run . >seen 2>&1
expect <<'SEEN'
default client: http, version 28.0.0
own http.Transport{}: https, http: server gave HTTP response to HTTPS client
own http.Transport{} without HTTP/2: http, version 28.0.0
own http.Transport{} and WithScheme("http"): http, version 28.0.0
SEEN
