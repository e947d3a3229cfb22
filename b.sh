set -e
cd /tmp/dev5/csrc
F="-O3 -std=c++17 -fPIC -Wall -Wextra -Wpedantic -fvisibility=hidden -ffp-contract=off -fno-trapping-math -fno-strict-aliasing -I. -I/tmp/proto -DEMA_FUSED_HAVE_AVX2 -DEMA_FUSED_HAVE_AVX512 $(/work/main/.venv/bin/python -m pybind11 --includes)"
B=/tmp/dev5/b
g++ $F -DEMA_FUSED_ISA=baseline -c update_cpu_kernels.cpp -o $B/k0.o &
g++ $F -mavx2 -mfma -DEMA_FUSED_ISA=avx2 -c update_cpu_kernels.cpp -o $B/k1.o
g++ $F -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512 -DEMA_FUSED_ISA=avx512 -c update_cpu_kernels.cpp -o $B/k2.o &
for f in chunk_table update_cpu torch_doors tensor_watch plan watch bindings; do g++ $F -c $f.cpp -o $B/$f.o; done
wait
g++ -shared $B/*.o -ldl -o ../ema_fused/_C$(/work/main/.venv/bin/python -c "import sysconfig;print(sysconfig.get_config_var('EXT_SUFFIX'))")
