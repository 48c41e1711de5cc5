package main

import (
	"context"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/metrics"
)

// runCommand runs the server until ctx is done.
func runCommand(ctx context.Context, call *cli.Call) error {
	load := schema.Flags(call.Flags, call.Getenv)
	if _, err := call.Parse(); err != nil {
		return err
	}
	s, err := load()
	if err != nil {
		return err
	}
	if err := metrics.CheckWebConfig(s.WebConfigFile); err != nil {
		return config.FileError(err)
	}
	cfg := domainConfig(s, call.Env)
	cfg.Started = cli.Started(call.Getenv, cfg.Log)
	defer cli.Outlive(cfg.Log)()
	d, err := server.Open(ctx, cfg)
	if err != nil {
		return err
	}
	return d.Run(ctx)
}

// domainConfig converts the configuration.
func domainConfig(s *settings, e cli.Env) server.Config {
	return server.Config{
		TrustDomain:      s.TrustDomain,
		DataDir:          s.DataDir,
		KeyFile:          s.KeyFile,
		Deployments:      s.deployments(),
		AdminSocket:      s.AdminSocket,
		AdminSocketMode:  s.AdminSocketMode,
		OperatorAddress:  s.OperatorAddress,
		Managers:         s.Managers,
		Readers:          s.Readers,
		EndpointAddress:  s.EndpointAddress,
		EndpointProfile:  s.EndpointProfile,
		EndpointCertFile: s.EndpointCertFile,
		EndpointKeyFile:  s.EndpointKeyFile,
		RefreshHint:      s.RefreshHint,
		Federation:       s.endpoints(),
		MetricsAddress:   s.MetricsAddress,
		WebConfigFile:    s.WebConfigFile,
		KeysetLifetime:   s.KeysetLifetime,
		X509TTL:          s.X509TTL,
		JWTTTL:           s.JWTTTL,
		Rotation:         s.policy(),
		Version:          cli.Version(version),
		Log:              cli.NewLog(e.Stderr, s.LogLevel, s.LogFormat, e.Getenv),
	}
}
