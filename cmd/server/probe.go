package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/clock"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/listen"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/endpoint"
	"github.com/renewd/renewd/internal/server/federation"
	"github.com/renewd/renewd/internal/server/nodeattest/k8spsat"
	"github.com/renewd/renewd/internal/server/nodeattest/x509pop"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
	"github.com/renewd/renewd/internal/socket"
	"github.com/renewd/renewd/metrics"
)

// probeMachine reports what the server would find on this machine.
func probeMachine(ctx context.Context, _ func(string) string, shared *config.Checker[settings]) {
	c := checker{shared}
	c.probeStore(ctx)
	c.probeFiles()
	c.probeNodeAttestation()
	c.probeListeners()
}

// probeStore checks the key and the store, and that they belong together.
func (c checker) probeStore(ctx context.Context) {
	var key seal.Manager
	if c.Config.KeyFile != "" { // otherwise systemd gives it to the service alone
		var err error
		key, err = seal.File(c.Config.KeyFile)
		c.File("key_file", err, "")
		c.foreign("key_file", c.Config.KeyFile)
	}
	path := filepath.Join(c.Config.DataDir, server.FileName)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return // the server makes it
	}
	// Without a key it checks all but what is encrypted.
	_, err := store.Inspect(ctx, path, store.Options{TrustDomain: c.Config.TrustDomain, Seal: key})
	if errors.Is(err, store.ErrInUse) {
		c.Warn("data_dir", "has a store that is not checked while a process, such as the running server, has it open", "")
		return
	}
	c.File("data_dir", config.FileError(err), "")
}

// foreign warns root of a file that the server's user cannot read: probably the owner of
// data_dir, as in the unit. Another user finds out by reading the file.
func (c checker) foreign(path, file string) {
	var dir, f unix.Stat_t
	if os.Geteuid() != 0 || errors.Join(unix.Stat(c.Config.DataDir, &dir), unix.Stat(file, &f)) != nil || dir.Uid == 0 {
		return
	}
	if f.Uid == dir.Uid || f.Mode&0o004 != 0 || f.Gid == dir.Gid && f.Mode&0o040 != 0 {
		return
	}
	c.Warn(path, fmt.Sprintf("belongs to user %d, and user %d, who owns data_dir, cannot read it", f.Uid, dir.Uid), "give it to the user that the server runs as (chown)")
}

// probeFiles checks the files of certificates, bundles and the metrics listener.
func (c checker) probeFiles() {
	if c.Config.EndpointCertFile != "" && c.Config.EndpointKeyFile != "" {
		cert, err := endpoint.LoadCertificate(c.Config.EndpointCertFile, c.Config.EndpointKeyFile)
		c.File("bundle_endpoint.cert_file", err, "")
		if err == nil {
			c.dates("bundle_endpoint.cert_file", cert.Leaf.NotBefore, cert.Leaf.NotAfter)
		}
		c.foreign("bundle_endpoint.key_file", c.Config.EndpointKeyFile)
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Federation)) {
		if file := c.Config.Federation[name].File; file != "" {
			c.File("federation."+name+".bundle_file", federation.CheckFile(file), "write the bundle of "+name+" to it, in SPIFFE's format or as PEM")
		}
	}
	if c.Config.WebConfigFile != "" {
		c.File("metrics.web_config_file", config.FileError(metrics.CheckWebConfig(c.Config.WebConfigFile)), "")
	}
}

func (c checker) dates(path string, begin, end time.Time) {
	switch now := time.Now(); {
	case now.After(end):
		c.Warn(path, "has expired on "+clock.Text(end), "renew it")
	case now.Before(begin):
		c.Warn(path, "is not valid before "+clock.Text(begin), "check this machine's clock")
	}
}

// probeNodeAttestation checks the files of verifiers.
func (c checker) probeNodeAttestation() {
	for _, name := range slices.Sorted(maps.Keys(c.Config.Deployments)) {
		path := "deployments." + name + ".node_attestation.x509pop.ca_bundle_files"
		for i, file := range c.Config.Deployments[name].X509Pop.CABundleFiles {
			c.File(fmt.Sprintf("%s[%d]", path, i), x509pop.CheckFile(file), "")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Clusters)) {
		cluster := c.Config.Clusters[name].Cluster
		cluster.Name = name
		path := "kubernetes_clusters." + name + "."
		_, err := k8spsat.New(c.Config.TrustDomain, []k8spsat.Cluster{cluster})
		if cluster.Kubeconfig == "" && err != nil {
			c.Warn(path+"service_account_allow_list", "belongs to a cluster that cannot be reached here: "+err.Error(), "")
		} else {
			c.File(path+"kube_config_file", err, "")
		}
	}
}

// probeListeners checks that the socket and the addresses can be listened on.
func (c checker) probeListeners() {
	if c.Config.ListenAddress != "" || len(c.Config.Deployments) == 0 {
		c.Listens("listen_address", listen.Check(cmp.Or(c.Config.ListenAddress, defaultAddress)))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Config.Deployments)) {
		if name != server.DefaultDeployment || c.Config.ListenAddress == "" {
			c.Listens("deployments."+name+".listen_address", listen.Check(c.Config.Deployments[name].ListenAddress))
		}
	}
	c.Listens("admin_socket", socket.Check(c.Config.AdminSocket))
	c.Listens("operators.address", listen.Check(c.Config.OperatorAddress))
	c.Listens("bundle_endpoint.address", listen.Check(c.Config.EndpointAddress))
	c.Listens("metrics.address", listen.Check(c.Config.MetricsAddress))
}
