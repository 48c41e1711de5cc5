#!/usr/bin/env bash
# Kubernetes' Go client writes to the standard error of a program that has configured no logging.
#
# Seen with   k8s.io/client-go v0.37.2
# Behaviour   If the connection ends in the middle of an answer, the client returns an error, as it should,
#             and also writes a line in the format of klog to standard error. The default logger
#             of klog is active in every program that imports client-go, without a flag or an
#             initialization. Nothing in rest.Config changes that: only klog's global functions
#             or a logger in the context of the call do.
# Operators   A daemon that logs JSON has lines in its log that no parser of JSON accepts, just while
#             its API server is in trouble. For a command, they are mixed with its messages.
# renewd      calls the client with a context whose logger discards (internal/server/nodeattest/k8spsat),
#             and logs the returned error itself.
#
# Output seen
#   error: unexpected error when reading response body. Please retry. Original error: unexpected EOF
#   standard error: E0101 00:00:00.000000 1 request.go:N] "Unexpected error when reading response body" err="unexpected EOF"
#   with a logger in the context: 0 bytes
source "$(dirname "$0")/lib.sh"
go_module k8s.io/client-go@v0.37.2 github.com/go-logr/logr@v1.4.3 k8s.io/klog/v2@v2.140.0
cat >main.go <<'GO'
package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
)

func main() {
	// The server announces more than it sends, as one that is stopped in the middle.
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", "1000")
		io.WriteString(w, `{"major":"1"`)
	}))
	defer api.Close()
	client, err := rest.UnversionedRESTClientFor(&rest.Config{
		Host: api.URL,
		ContentConfig: rest.ContentConfig{
			GroupVersion:         &schema.GroupVersion{},
			NegotiatedSerializer: serializer.NewCodecFactory(runtime.NewScheme()),
		},
	})
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	if len(os.Args) > 1 {
		ctx = klog.NewContext(ctx, logr.Discard())
	}
	err = client.Get().AbsPath("/version").Do(ctx).Error()
	fmt.Println("error:", err)
}
GO
go build -o client . 2>build.log || { cat build.log >&2; exit 1; }
{
	./client 2>err
	echo "standard error: $(sed -E 's/^E[0-9]{4} [0-9:.]+ +[0-9]+ request.go:[0-9]+\]/E0101 00:00:00.000000 1 request.go:N]/' err)"
	./client discard 2>err >/dev/null
	echo "with a logger in the context: $(wc -c <err) bytes"
} >seen
expect <<'SEEN'
error: unexpected error when reading response body. Please retry. Original error: unexpected EOF
standard error: E0101 00:00:00.000000 1 request.go:N] "Unexpected error when reading response body" err="unexpected EOF"
with a logger in the context: 0 bytes
SEEN
