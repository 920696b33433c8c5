/*
 * A program of several ranks for l3_mpi: adds the ranks' numbers up, sends a token around all ranks, and says so.
 *
 * It is compiled once for MPICH and once for Open MPI, on the host, which has neither of them nor their headers: what it
 * needs of mpi.h is declared here. The values and symbols are parts of the binary interfaces of both (MPICH ABI
 * compatibility initiative; Open MPI's "ompi_mpi_*" symbols), which their shared libraries keep within a soname.
 */
#include <stdio.h>
#include <stdlib.h>

#ifdef OPEN_MPI
typedef void *handle;
extern char ompi_mpi_comm_world, ompi_mpi_int, ompi_mpi_op_sum;
#define MPI_COMM_WORLD ((handle)&ompi_mpi_comm_world)
#define MPI_INT ((handle)&ompi_mpi_int)
#define MPI_SUM ((handle)&ompi_mpi_op_sum)
#define MPI_STATUS_IGNORE ((void *)0)
#else
typedef int handle;
#define MPI_COMM_WORLD ((handle)0x44000000)
#define MPI_INT ((handle)0x4c000405)
#define MPI_SUM ((handle)0x58000003)
#define MPI_STATUS_IGNORE ((void *)1)
#endif

int MPI_Init(int *, char ***);
int MPI_Finalize(void);
int MPI_Comm_rank(handle, int *);
int MPI_Comm_size(handle, int *);
int MPI_Get_processor_name(char *, int *);
int MPI_Allreduce(const void *, void *, int, handle, handle, handle);
int MPI_Send(const void *, int, handle, int, int, handle);
int MPI_Recv(void *, int, handle, int, int, handle, void *);

int main(int argc, char **argv)
{
    int rank, size, length, sum, token = 0;
    char name[1024] = "";

    if (MPI_Init(&argc, &argv))
        return 90;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Get_processor_name(name, &length);
    int own = rank + 1;
    if (MPI_Allreduce(&own, &sum, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD))
        return 91;
    if (rank > 0 && MPI_Recv(&token, 1, MPI_INT, rank - 1, 7, MPI_COMM_WORLD, MPI_STATUS_IGNORE))
        return 92;
    token += rank;
    if (rank + 1 < size && MPI_Send(&token, 1, MPI_INT, rank + 1, 7, MPI_COMM_WORLD))
        return 93;
    printf("rank %d of %d on %s: sum %d, token %d\n", rank, size, name, sum, token);
    fflush(stdout);
    MPI_Finalize();
    return 0;
}
